"""What operators scrape: figures of a running controller or worker as OpenMetrics, on an HTTP port of its own."""
