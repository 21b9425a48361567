"""What MIFO costs, beside a plain implementation of the same method."""
