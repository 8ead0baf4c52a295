"""What a compiled step will need and do on devices that nobody has to own."""
