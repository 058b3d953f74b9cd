"""monitor: `kata-monitor`, the door for metrics of all sandboxes of a host, and for people with a browser.

Reads records and asks each sandbox's management socket; changes nothing.
"""
