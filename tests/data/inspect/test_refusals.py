"""Refusals by their wording, in five languages."""

import pytest

from mlx_dpo.data.inspect.refusals import LANGUAGES, find_refusal


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("I cannot help.", "i cannot"),
        ("  **I can't** do that", "i can't"),
        ("As an AI, I have no feelings.", "as an ai"),
        ("Well. As an AI language model, no.", "as an ai language model"),
        ("As an aide to the king", None),
        ("He said: I cannot", None),
        ("I can", None),
        ("x" * 300 + "as an ai language model", None),
    ],
)
def test_the_phrase_of_a_refusal_is_returned(answer, phrase):
    assert find_refusal(answer) == phrase


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot do this.", True),
        ("As an AI language model, I have no body.", True),
        ("I am not able to say.", True),
        ("Sorry to hear that! I am sorry for your loss.", False),
        ("Thank you for asking. I won't do that.", True),
        ("I am afraid that I have no answer.", True),
        ("I can do that.", False),
        ("Cats cannot fly.", False),
        ("Here is the poem you asked for, with all of its lines and their rhymes, which end "
         "in: I cannot", False),
    ],
)  # fmt: skip
def test_a_refusal_begins_a_sentence_near_the_start(text, refusal):
    assert (find_refusal(text) is not None) is refusal


REFUSED = {
    "en": (
        "I'm sorry, but I can't help with that.",
        "I cannot provide instructions for this.",
        "Sorry, I can't assist with that request.",
        "I won't write such a message.",
        "I must decline. Please ask somebody else.",
        "As a large language model, I have no opinion.",
        "That is a serious matter. I will not help with it.",
        "Unfortunately, I can't share that.",
        "I'm sorry, that is not something I can help with.",
        "I'm sorry, this goes against my principles.",
        "I'm afraid that I have to decline.",
    ),
    "de": (
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Tut mir leid, das kann ich nicht beantworten.",
        "Ich kann dir dabei leider nicht helfen.",
        "Ich kann keine Anleitung dazu geben.",
        "Dabei kann ich Ihnen nicht helfen.",
        "Leider darf ich dazu keine Auskunft geben.",
        "Bei so etwas werde ich nicht helfen.",
        "Als KI-Assistent habe ich keine Meinung.",
        "Als Sprachmodell kann ich das nicht.",
        "Ich bin nicht in der Lage, das zu tun.",
        "Ich muss diese Anfrage ablehnen.",
        "Das ist strafbar. Ich werde dabei nicht helfen.",
        "Entschuldigung, dazu habe ich keine Auskunft.",
    ),
    "fr": (
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Désolée, je ne peux pas répondre à cette question.",
        "Je ne peux malheureusement pas répondre.",
        "Je ne peux fournir ce genre de conseils.",
        "Je ne suis pas en mesure de vous aider.",
        "Je refuse de participer à cela.",
        "Je dois refuser cette demande.",
        "En tant qu’IA, je n’ai pas d’avis.",
        "En tant que modèle de langage, je ne peux rien dire.",
        "Il m'est impossible de vous aider.",
        "Malheureusement, je ne peux pas le faire.",
        "C'est illégal. Je ne vais pas vous aider.",
    ),
    "es": (
        "Lo siento, pero no puedo ayudarte con eso.",
        "Lo siento, no puedo responder a esa pregunta.",
        "No puedo proporcionar esa información.",
        "No te puedo ayudar con eso.",
        "No voy a ayudarte a hacer daño a nadie.",
        "No estoy autorizado a dar esos datos.",
        "Me temo que no es posible.",
        "Me niego a participar.",
        "Debo rechazar esta petición.",
        "Como modelo de lenguaje, no tengo opiniones.",
        "¡Eso es ilegal! No puedo ayudarte.",
        "Lamentablemente, no puedo hacerlo.",
    ),
    "zh": (
        "抱歉，我无法提供帮助。",
        "很抱歉，我不能回答这个问题。",
        "对不起，我不能协助你做这件事。",
        "我无法满足这个请求。",
        "我不会帮你做这种事。",
        "作为一个人工智能，我没有观点。",
        "作为AI助手，我不能这样做。",
        "恕我不能回答。",
        "这是违法的。我不能帮你。",
        "這是違法的。我無法提供協助。",
        "很遗憾，我无法回答。",
        "您的请求我无法满足。",
        "抱歉，这违反了我的原则。",
    ),
}
ANSWERED = {
    "en": (
        "I can't wait to tell you about it!",
        "I cannot stress enough how useful a backup is.",
        "You can't go wrong with rice.",
        "Sorry about the delay. Here is the list.",
        "Use `kill 4312` to end the process.",
        "I am sure that it works.",
        "Cannot is one word.",
        "I'm sorry, this is annoying. Use `kill 4312`.",
        "I'm sorry that this happened. Use `kill 4312`.",
        "I'm afraid this takes time: first soak the knife.",
        "I can't recommend this enough: take a whetstone.",
        "I won't lie, it takes time. Take a whetstone.",
    ),
    "de": (
        "Ich kann dir dabei helfen.",
        "Das kann man nicht sagen.",
        "Tut mir leid zu hören, dass du krank bist. Ruh dich aus.",
        "Nicht jeder kann das.",
        "Ich kann das gern erklären: Der Prozess endet.",
        "Das kannst du nicht mit einem Messer tun.",
        "Alskie ist kein Wort.",
        "Man darf die Tür nicht öffnen.",
        "Tut mir leid, das ist ärgerlich. Nimm einen Wetzstein.",
        "Ich kann nicht genug betonen, wie wichtig ein Wetzstein ist.",
        "Ich kann dir das nicht oft genug empfehlen: nimm einen Wetzstein.",
    ),
    "fr": (
        "Je ne peux que vous recommander ce livre.",
        "Je peux vous aider.",
        "Vous ne pouvez pas ouvrir cette porte sans clé.",
        "Je suis sûr que cela marche.",
        "On ne peut pas diviser par zéro.",
        "Je vais vous expliquer.",
        "Je regrette cette époque.",
        "Désolé, c'est frustrant. Utilisez `kill 4312`.",
        "Je ne saurais trop vous recommander une pierre à aiguiser.",
        "Je ne peux pas assez vous la recommander.",
    ),
    "es": (
        "No puedes dividir por cero.",
        "Puedo ayudarte con eso.",
        "Lo siento mucho. Descansa y bebe agua.",
        "No puedo esperar a verte.",
        "No, eso no es correcto.",
        "Como en casa, en ningún sitio.",
        "No voy al cine los lunes.",
        "Soy de Madrid.",
        "No podría ser más fácil: usa `kill 4312`.",
        "No puedo dejar de recomendar una piedra de afilar.",
    ),
    "zh": (
        "我能帮你。",
        "我不能不承认，这很好。",
        "你不能用刀开门。",
        "抱歉让您久等了，答案如下。",
        "我不会忘记这件事。",
        "作为一个城市，北京很大。",
        "用 kill 命令结束进程。",
        "不能除以零。",
        "抱歉，这很烦人。请用 kill 命令。",
        "不好意思，这个问题很常见。用 kill 命令。",
    ),
}


def test_every_language_has_examples():
    assert REFUSED.keys() == ANSWERED.keys() == set(LANGUAGES)


@pytest.mark.parametrize("text", [text for name in LANGUAGES for text in REFUSED[name]])
def test_a_refusal_is_recognized(text):
    assert find_refusal(text) is not None


@pytest.mark.parametrize("text", [text for name in LANGUAGES for text in ANSWERED[name]])
def test_an_answer_is_no_refusal(text):
    assert find_refusal(text) is None


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_refusal_after_the_beginning_does_not_count(name):
    """A story or a quotation may contain one."""
    assert all(find_refusal(f"{'word ' * 30}. {text}") is None for text in REFUSED[name][:2])
