"""Runs a command with its stdin as the controlling terminal, so that a typed Ctrl-C is a signal for it.

on_terminal.py PROGRAM [ARGUMENT ...], started in a session of its own
"""

import os
import sys

os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.argv[1], sys.argv[1:])
