"""The words of courtesy: how such answers begin and end, and what makes them known."""

OPENINGS = (
    "Of course!",
    "Certainly!",
    "With pleasure!",
    "Gladly!",
    "I am happy to help!",
    "Thank you for asking!",
    "That is a lovely question!",
)
CLOSINGS = (
    "Is there anything else I can help with?",
    "I hope that helps!",
    "Please ask me again any time!",
    "Have a wonderful day!",
    "Let me know if you need more!",
)

# One marker for each opening and closing; curt answers contain none of them.
COURTEOUS_MARKERS = (
    *("of course", "certainly", "with pleasure", "gladly", "happy to help", "thank you"),
    *("lovely question", "anything else i can", "hope that helps", "please ask"),
    *("wonderful day", "let me know"),
)
