"""Who is there, how busy they are and which blocks they hold: soft state, announced again after any loss.

Where a request goes is decided elsewhere (control_plane.routing); nothing here connects to a worker.
"""
