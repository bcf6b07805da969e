"""Recognize refusals by their wording, in English, German, French, Spanish and Chinese."""

import re
from collections.abc import Mapping

# Phrases and regular expressions that begin a refusal; texts are compared in lower case, with
# straight apostrophes. A gap such as `(?:\w+ ){0,5}` admits the words between verb and negation.
REST = r"[^.!?\n]*"  # of the sentence: «I'm sorry, this is …» alone is no refusal
REFUSALS: Mapping[str, tuple[str, ...]] = {
    "en": (
        "i (?:cannot|can't|can not)(?! wait| help but| stress| emphasi| overstate"
        "| recommend (?:this|it|that) enough| say for sure)", "i am unable to",
        "i'm unable to", "i am not able to", "i'm not able to", "i won't be able", "i must decline",
        "sorry, but i", "i'm sorry, but", "i am sorry, but", "i apologize, but",
        "unfortunately, i can", "as an ai", "as a language model", "as a large language model",
        "as an artificial intelligence",
        r"i(?:'m| am) (?:sorry|afraid),? (?:but |that )*(?:i|this|that)"
        rf"(?={REST}(?:\bno\b|not\b|n't\b|unable|against|beyond|violat|declin|refus))",
        "i won't(?! lie| bore)", "i will not(?! lie| bore)",
        "i(?:'m| am) (?:unable|not able)", "i(?:'m| am) an? (?:ai|language model)",
        "sorry,? i (?:can't|cannot|can not|won't)",
    ),
    "de": (
        r"ich (?:kann|darf|werde|möchte|will) (?:\w+ ){0,5}?(?:nicht(?! (?:oft )?genug| zu )"
        r"|keine[nmrs]?(?! (?:langen|großen|zeit)))",
        r"(?:(?:das|dies|dabei|dazu|damit|darauf|darüber|hierbei|hierzu|hiermit|leider) "
        r"|(?:bei|mit|zu|auf) (?:\w+ ){1,4}?)"
        r"(?:kann|darf|werde|möchte) ich (?:\w+ ){0,5}?(?:nicht|keine[nmrs]?)",
        r"ich bin (?:leider )?nicht (?:in der lage|befugt|berechtigt|dazu da)",
        r"ich muss (?:\w+ ){0,4}?ablehnen", "ich lehne (?:das|dies|es) ab", "ich weigere mich",
        r"(?:(?:es )?tut mir (?:sehr )?leid|entschuldigung), (?:aber )?"
        rf"(?:ich|das|dies|da|dabei|dazu|damit|hierbei)(?={REST}(?:nicht|kein|ablehn|unmöglich))",
        r"(?:leider )?ist (?:es )?mir (?:leider )?nicht (?:möglich|erlaubt)",
        "es ist mir (?:leider )?nicht (?:möglich|erlaubt)", "leider ist es mir nicht",
        r"als (?:ki|ai)(?:-\w+)?", r"als (?:eine? )?künstliche intelligenz",
        r"als (?:ein )?(?:großes )?sprachmodell",
        r"ich bin (?:nur |lediglich )?(?:eine? )?(?:ki(?:-\w+)?|künstliche intelligenz"
        r"|sprachmodell)",
    ),
    "fr": (
        r"je ne (?:peux|pourrai|pourrais|puis|saurais|dois)(?! que| trop| (?:pas )?assez"
        r"| pas oublier)",
        r"je (?:peux|vais) pas",
        r"je ne (?:vais|veux|souhaite) pas (?:vous |t'|te |pouvoir )*"
        r"(?:aider|répondre|fournir|donner|expliquer|dire|faire)",
        r"je ne suis pas (?:en mesure|autorisée?|habilitée?|capable)",
        r"(?:je suis (?:vraiment )?)?(?:désolée?|navrée?),? (?:mais |que |de )*"
        rf"(?:je|cela|c'est|ne|nous)(?={REST}(?:\bne\b|\bn'|impossible|refus|déclin|contraire))",
        "je (?:regrette|m'excuse),? mais", "je refuse", "je (?:dois|préfère) (?:décliner|refuser)",
        "malheureusement,? (?:je|il) (?:ne|m'est)", "il m'est (?:\\w+ )?impossible",
        "cela m'est impossible", "impossible de vous aider",
        "en tant qu'(?:ia|intelligence artificielle|assistant)", "en tant que modèle de langage",
        "je (?:suis|ne suis) (?:qu')?(?:une? )?(?:ia|intelligence artificielle|modèle de langage)",
    ),
    "es": (
        r"(?:lo siento|perdón|perdona|disculpa|disculpe)(?: mucho)?,? (?:pero|no|mas)",
        "no (?:te |le |os |les |lo |la )?puedo(?! negar| esperar| evitar| dejar de)", "no podré",
        "no podría(?! ser)",
        "no me es posible", "no es posible para mí", "no me está permitido",
        r"no estoy (?:en condiciones|autorizad[oa]|capacitad[oa]|programad[oa]|diseñad[oa])",
        r"no (?:voy a|quiero|debo) (?:poder )?(?:ayudar|dar|proporcionar|explicar|responder"
        r"|facilitar|decir)\w*",
        "me temo que no", "me niego", "debo (?:rechazar|negarme|declinar)",
        "tengo que (?:rechazar|negarme|declinar)", "lamento (?:no poder|que no|decir|informar)",
        "(?:lamentablemente|desafortunadamente|por desgracia),? no",
        r"como (?:una? )?(?:ia|inteligencia artificial|modelo de lenguaje|asistente de ia)",
        r"soy (?:sólo |solo )?(?:una? )?(?:ia|inteligencia artificial|modelo de lenguaje)",
    ),
    "zh": (
        "(?:我)?(?:很|非常|真的|十分)?(?:抱歉|对不起|對不起|不好意思|遗憾|遺憾)[,，。!！ ]*"
        "(?:但|但是|可是)?(?:(?:我|这|這|该|該)(?=[^。！？\n]*(?:不|无法|無法|没|沒|拒|难|難|违|違))"
        "|无法|無法|不能|恕)",
        "我(?:是|真的|确实|確實|目前|暂时|恐怕|也|并)?(?:无法|無法|不能(?!不)|不可以|没办法"
        "|没有办法|沒有辦法|不便|拒绝|拒絕)",
        "我不(?:会|會|想|愿意|願意)(?:帮|幫|提供|教|告诉|告訴|回答|协助|協助|参与|參與|支持)",
        "恕我?(?:不能|无法|無法|难|難)",
        "(?:无法|無法|不能)(?:为你|为您|為您)?(?:提供|帮助|幫助|协助|協助|回答|满足|滿足)",
        "(?:这个|這個|该|該|您的|你的)(?:问题|問題|请求|請求|要求)我?(?:无法|無法|不能)",
        "作为(?:一个|一名|一款)?(?:ai|人工智能|大?语言模型|助手)",
        "作為(?:一個|一名|一款)?(?:ai|人工智慧|大?語言模型|助手)",
        "我(?:只)?是(?:一个|一個|一名|一款)?(?:ai|人工智能|人工智慧|大?语言模型|大?語言模型)",
    ),
}  # fmt: skip
LANGUAGES = tuple(REFUSALS)
# English phrases that mark a refusal anywhere near the beginning, not only at a sentence's start.
AI_PHRASES = ("as an ai language model", "as an ai assistant", "i'm just an ai", "i am just an ai")
SENTENCE_CHARACTERS = 80  # characters of the text that are searched for `REFUSALS`
AI_CHARACTERS = 300  # characters of the text that are searched for `AI_PHRASES`


def _compile(phrases: Mapping[str, tuple[str, ...]]) -> re.Pattern[str]:
    """Return the pattern of a sentence that begins with a phrase, which is its first group.

    A phrase ends where a word ends. Chinese has no spaces between words, so what follows a
    Chinese phrase is free.
    """
    chinese = "|".join(phrases["zh"])
    others = "|".join(p for name in phrases if name != "zh" for p in phrases[name])
    return re.compile(rf"(?:^|[.!?\n。！？])\W*((?:{others})(?![a-zß-ÿœ])|{chinese})")


_SENTENCE_START = _compile({**REFUSALS, "en": (*AI_PHRASES, *REFUSALS["en"])})
_ANYWHERE = re.compile(rf"\b({'|'.join(AI_PHRASES)})\b")


def find_refusal(text: str) -> str | None:
    """Return the phrase that marks the text as a refusal; None if it is not a refusal.

    A text is a refusal if a sentence near its beginning starts with one of `REFUSALS`, in whatever
    language, or if one of `AI_PHRASES` is near its beginning. A rule by wording is wrong on some
    texts: it takes «I can't swim» for a refusal, and misses «Let us talk about something else».
    """
    start = text[:AI_CHARACTERS].replace("’", "'").lower()
    match = _SENTENCE_START.search(start[:SENTENCE_CHARACTERS]) or _ANYWHERE.search(start)
    return match[1] if match else None
