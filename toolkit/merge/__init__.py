"""Methods that make one model of several, or edit one by hand."""
