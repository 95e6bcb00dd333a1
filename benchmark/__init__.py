"""Programs that measure Moonreel on this machine. May import everything; nothing imports them."""
