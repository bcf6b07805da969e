"""Build models/tiny-critic: tiny-chat, trained on to criticise, revise and obey."""
