"""Programs that run on other machines, which may lack mlx-dpo: `ssh.py` sends them as text.

They import only the standard library.
"""
