"""What draws figures and writes pages."""
