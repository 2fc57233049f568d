"""Network parts that two or more methods share."""
