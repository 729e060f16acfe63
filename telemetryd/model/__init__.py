"""What there is and what can be asked, as plain data: no I/O, no SQL, no HTTP."""
