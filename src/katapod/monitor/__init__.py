"""monitor: `kata-monitor`, metrics of all sandboxes of a host for Prometheus, and a web page.

Reads records and asks each sandbox's management socket; changes nothing.
"""
