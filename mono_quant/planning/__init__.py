"""What is decided and accounted for without touching a weight: kinds of layers, rules, the request, the report."""
