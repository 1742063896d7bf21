"""No password is shown, in whatever form it stands in a store's URL and wherever it could show."""

import logging
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jobs import wait_until
from loops import mlp, train
from sqlalchemy import make_url

from gradwatch import Agent, errors
from gradwatch.config import Settings, redact, resolve_store
from gradwatch.secrets import scrub
from gradwatch_dashboards import doctor
from gradwatch_monitor import Store
from gradwatch_monitor.migrations import migrate

AT = "127.0.0.1:1/db"  # where nobody listens

# Each holds secrets, and what they are made of: no piece may show, encoded or not.
FORMS = {
    "plain": (f"postgresql+psycopg://me:s3cretA@{AT}", ["s3cretA"]),
    "percent-encoded": (f"postgresql+psycopg://me:s3c%40retB@{AT}", ["s3c%40retB", "s3c@retB", "retB"]),
    "a raw @": (f"postgresql+psycopg://me:s3cr@etCC@{AT}", ["s3cr", "etCC"]),
    "two raw @": (f"postgresql+psycopg://me:s3cr@etCC@moreD@{AT}", ["s3cr", "etCC", "moreD"]),
    "a raw /": (f"postgresql+psycopg://me:s3cr/etEE@{AT}", ["s3cr", "etEE"]),
    "a raw ?": (f"postgresql+psycopg://me:s3cr?etFF@{AT}", ["s3cr", "etFF"]),
    "a raw ? and @": (f"postgresql+psycopg://me:s3cr@etGG?more@{AT}", ["s3cr", "etGG", "more"]),
    "a raw #": (f"postgresql+psycopg://me:s3cr#etHH@{AT}", ["s3cr", "etHH"]),
    "a raw :": (f"postgresql+psycopg://me:s3cr:etII@{AT}", ["s3cr", "etII"]),
    "password=": (f"postgresql+psycopg://{AT}?user=me&password=s3cretJ", ["s3cretJ"]),
    "password= with @": (f"postgresql+psycopg://{AT}?password=s3cr@etKK", ["s3cr", "etKK"]),
    "PASSWORD=": (f"postgresql+psycopg://{AT}?PASSWORD=s3cretL", ["s3cretL"]),
    "both": (f"postgresql+psycopg://me:s3cretM@{AT}?password=s3cretN", ["s3cretM", "s3cretN"]),
    "sslpassword": (f"postgresql+psycopg://me@{AT}?sslpassword=s3cretO", ["s3cretO"]),
    "passfile": (f"postgresql+psycopg://me@{AT}?passfile=/home/s3cretP", ["s3cretP"]),
    "options": (f"postgresql+psycopg://me@{AT}?options=-c%20a.b%3Ds3cretR", ["s3cretR"]),
    "no port": ("postgresql+psycopg://me:s3cretS@host:port/db", ["s3cretS"]),
    "another database": (f"mysql://me:s3cr@etTT@{AT}", ["s3cr", "etTT"]),
}  # fmt: skip
each_form = pytest.mark.parametrize(("url", "secrets"), FORMS.values(), ids=FORMS)


def shown(text, secrets):
    return [secret for secret in secrets if secret in text]


@each_form
def test_in_a_redacted_url(url, secrets):
    """The host is still shown where it can be told apart from the password."""
    assert shown(redact(url), secrets) == []
    assert redact(url).startswith(url.partition("://")[0])


@each_form
def test_in_a_drivers_words(url, secrets):
    """Whatever a driver says of the secrets it was handed."""
    for secret in (*secrets, url):
        assert shown(scrub(f'invalid value "{secret}" in connection', url), secrets) == []


@each_form
def test_in_errors_logs_pages_and_the_ring(url, secrets, caplog, monkeypatch):
    """A watched run, a reader, a migration, doctor, the settings: none of them shows it."""
    said = []
    try:
        resolve_store(url)
    except errors.ConfigurationError as error:
        said.append(str(error))
    for opens in (Store, migrate, lambda u: Settings.load(store=u)):
        try:
            said.append(repr(opens(url)))
        except errors.GradwatchError as error:
            said.append(str(error))
    monkeypatch.setenv("GRADWATCH_STORE", url)
    try:
        said += [str(check) for check in doctor.examine(Settings.load().store, {})]
    except errors.ConfigurationError:
        said += [str(check) for check in doctor.examine("sqlite:///x.db", {})]
    assert said
    for text in said:
        assert shown(text, secrets) == []


@pytest.mark.parametrize("form", ["a raw @", "password=", "percent-encoded"])
def test_in_what_a_watched_run_leaves(form, caplog):
    """Its log, its flight recorder, its settings."""
    url, secrets = FORMS[form]
    caplog.set_level(logging.DEBUG)
    model = mlp()
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = Agent(optimizer, store=url)
    train(model, optimizer, 3)
    assert not agent.flush(0.5)
    wait_until(lambda: any("cannot write the store" in m for m in caplog.messages))
    channel = agent._recording.channel
    held = channel.ring.path.read_bytes().decode("latin-1")
    for text in (*caplog.messages, held, repr(channel.run), repr(agent._recording.settings)):
        assert shown(text, secrets) == []
    agent._recording.pipeline.close(channel, "finished", 0.1)
    channel.ring.path.unlink()


@pytest.mark.parametrize(
    ("url", "password", "host"),
    [
        ("postgresql://me:a@b@host/db", "a@b", "host"),
        ("postgresql://me:a@b@c@host:5/db?sslmode=require", "a@b@c", "host"),
        ("postgresql://me:a%40b@host/db", "a@b", "host"),
        ("postgresql://me:a@b%20c@host/db", "a@b c", "host"),
        ("postgresql://me:a/b%3Fc@host/db", "a/b?c", "host"),
        ("postgresql://me@host/db", None, "host"),
    ],
)
def test_a_raw_password_means_what_it_says(url, password, host):
    """SQLAlchemy, which cuts at the first @, is handed what the user meant."""
    parsed = make_url(resolve_store(url))
    assert (parsed.password, parsed.host, parsed.database) == (password, host, "db")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:a@b?c@host/db",
        "postgresql://me:77/secret?word@host/db",
        "postgresql://host:1/db?password=a@b",
        "postgresql:me:secret@host/db",
        "me:a secret@host/db",
        "sqlite://me:secret@",
    ],
)
def test_what_cannot_be_told_apart_is_an_error(url):
    """It says what to do, and shows nothing."""
    with pytest.raises(errors.ConfigurationError, match="right would be|is a file") as caught:
        resolve_store(url)
    assert shown(str(caught.value), ["secret", "word@", "a@b", "b?c"]) == []


# The forms, what of them is no secret, and how the password is written there.
AROUND = {
    "postgresql+psycopg://user:{}@db.example:5432/train?sslmode=require": str,
    "postgresql+psycopg://user:{}@[::1],db.example:1/train": str,
    "postgresql+psycopg://user:{}@db.example:port/train": str,
    "postgresql://user@db.example/train?sslmode=require&password={}": str,
    "postgresql://user@db.example:5432/train?password={}&user=user": str,
    "postgresql://user:{}@db.example:5432/train?dbname=train": lambda raw: quote(raw, safe=""),
    "postgresql://user%3A{}@db.example:5432/train": lambda raw: quote(raw, safe=""),
    "postgresql://db.example:5432/train?password={}": quote_plus,
    "postgresql:///user:{}@db.example/train": str,
    "postgresql:/user:{}@db.example/train": str,
    "postgresql:user:{}@db.example/train": str,
    "user:{}@db.example/train": str,
    "sqlite://user:{}@db.example/train": str,
    "sqlite+pysqlcipher://:{}@/train": str,
}
printable = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=4, max_size=20)
special = st.text("abcAB019:/@?#&=%+ ,[]'\\;$!", min_size=4, max_size=20)


@settings(max_examples=400)
@given(st.sampled_from(list(AROUND)), printable | special, st.integers(0), st.integers(4, 20))
@example("postgresql+psycopg://user:{}@db.example:5432/train?sslmode=require", "a@b?c=word", 0, 9)
@example("postgresql+psycopg://user:{}@db.example:5432/train?sslmode=require", "7/secret?x=y", 0, 9)
@example("postgresql://user@db.example/train?sslmode=require&password={}", "abcd&efgh=ijkl", 0, 9)
def test_no_four_characters_of_a_password_show(form, password, start, size):
    """Whatever characters it is made of: in the URL, in its error, in what a driver cuts of it."""
    assume("*" not in password)
    written = AROUND[form](password)
    url = form.format(written)
    pieces = {text[i : i + 4] for text in (password, written) for i in range(len(text) - 3)}
    # What is shown of the same URL with other passwords, or is said with every error, is known.
    known = " ".join([form, told(form.format("Q7:Q7@Q7?Q7")), told(form.format("Q7"))])
    pieces -= {known[i : i + 4] for i in range(len(known) - 3)}
    start %= len(written)
    cut = written[start : start + size]
    for text in (redact(url), told(url), scrub(f'invalid "{cut}" at', url), scrub(url, url)):
        assert shown(text, pieces) == []


def told(url):
    try:
        return redact(resolve_store(url))
    except errors.ConfigurationError as error:
        return str(error)
