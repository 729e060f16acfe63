"""What runs next to requests: feed, exports, certificates, alerts, upkeep."""
