"""What the rest may say to a VMM, whichever it is."""
