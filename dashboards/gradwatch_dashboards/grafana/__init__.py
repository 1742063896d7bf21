"""Grafana: dashboards made from the table of metrics, and how they get into a server."""
