"""This process and its fellows: how it starts, hears signals, waits, and is ended when it hangs."""
