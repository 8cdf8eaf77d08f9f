"""Tables and figures made from results alone; never imports torch."""
