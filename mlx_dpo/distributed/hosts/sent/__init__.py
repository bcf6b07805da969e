"""Programs that are sent to other machines as text, before anything is known of those.

They import nothing but the standard library. `ssh.py` sends them.
"""
