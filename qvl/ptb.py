"""Penn Treebank tokens of captions, as coco-caption's scorers see them, without Java.

coco-caption tokenizes with Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and then drops a list of
punctuation tokens. `tokenize` gives the same tokens. It was written from what the Java program prints, not from its
source: one regular expression lists the tokens that are kept, and what it does not match (white space, quotes, commas,
full stops, dashes, emoji, ...) is dropped.

Two consequences of upstream's order of steps are kept, because published numbers have them: brackets stay as the
tokens `-lrb-`, `-rrb-`, ... (the punctuation list has them in capitals, but the text is lower-cased first), and so do
runs such as `!!` and `??` (only the single marks are on the list).

Known differences, none of them in 3,575 captions and 8 in 2,441 lines of software documentation: `cannot's` and
`gonna's` (Java leaves the first word whole), `n't` with a back quote or an opening quote for its apostrophe, names like
`Toys'R'Us`, `1.5e-3`, `a.m.-p.m.`, `AT&T.,`, `0.11.x`, host names with a hyphen, addresses inside angle brackets, and
rare scripts, of which Java drops what Unicode got after 2010.
"""

import re

# A letter or digit. Not superscripts, vulgar fractions, circled numbers or anything beyond the basic plane.
_W = r"[^\W_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218f\u2460-\u24ff\u2776-\u2793\U00010000-\U0010ffff]"
_W = rf"(?:{_W}|[\u0300-\u036f\u064b-\u0652\u0900-\u0903\u093c\u093e-\u094d\u0e31\u0e34-\u0e3a\u0e47-\u0e4e])"
_APOSTROPHE = "['’]"

# Abbreviations that keep their full stop: in any case; not in capitals; only with a capital; only before a number.
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn asst atty aug ave bhd bldg blvd brig bros capt cf cie cmdr co col colo conn
    corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp
    intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms msgr mt
    natl neb nev nov oct okla penn pfc ph plc pres prof pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr
    st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo
"""
_ABBREVIATIONS_NOT_IN_CAPITALS = "mfg mtg ppte ppty pte ptes pty ptys"
_ABBREVIATIONS_WITH_CAPITAL = "ark az del ill la mass miss ore pa tex wash"
_ABBREVIATIONS_BEFORE_NUMBER = "art ca fig figs no nos op pp prop"
# A full stop between a single letter and one of these words, capitalized, ends a sentence.
_SENTENCE_STARTS = """
    a about according additionally after an as at but earlier he her here however if in it last many more now once one
    other our she since so some such that the their then there these they this we what when while yet you
"""


def _any_of(words: str) -> str:
    return "|".join(words.split())


_LEXER = re.compile(
    rf"""
    # Most of all text, first because it is fast: plain words and what stands between them.
      [A-Za-z]+ (?=[ ,] | \Z) | [ ] | [.,] (?=\s | \Z)
    | &(?:amp|lt|gt|quot|apos|nbsp|\#\d+);
    # Markup, addresses, names with @ and #.
    | </? [A-Za-z]\w* (?:\s[^<>]*)? /?>
    | (?i:https?)://[^\s"<>|()]* [^\s"<>|().,!?\-:'’”]
    | [\w.+\-]+ @ [A-Za-z0-9\-]+ (?:\.[A-Za-z0-9\-]+)*
    | (?:[A-Za-z0-9\-]+\.)+ (?:com|net|org) / [^\s"<>|()]+ [^\s"<>|().,!?\-:'’”]
    | @ [A-Za-z_]\w*
    | \# [A-Za-z]\w*
    | [<>]? [:;=] [\-o*']? [()\[\]\\|DOPp] (?![^\W\d_])
    | \^_\^ | -_- | >_<
    # Telephone numbers and mixed fractions, blanks included.
    | (?:\(\d{{2,3}}\)[ ]? | \+{{0,2}}(?:\d{{2,4}}[ \-])? \d{{2,4}}[ \-]) \d{{3,4}}[ \-]?\d{{3,5}}
    | \d{{1,4}}[ \-]\d{{1,4}}/\d{{1,4}}
    # Words that hold full stops.
    | (?:[A-Za-z] (?:\.[A-Za-z])+ | Ph\.D) \. (?:-{_W}+)* (?!{_W})
    | (?!\d){_W}+ (?:[.!?](?!\d){_W}+)+
    | (?:(?i:{_any_of(_ABBREVIATIONS)})
        | [A-Za-z] (?!\.\s+(?:{_any_of(_SENTENCE_STARTS.title())}|{_any_of(_SENTENCE_STARTS.upper())})(?:\s|\Z))
        | {_any_of(_ABBREVIATIONS_NOT_IN_CAPITALS)} | {_any_of(_ABBREVIATIONS_NOT_IN_CAPITALS.title())}
        | {_any_of(_ABBREVIATIONS_WITH_CAPITAL.title())} | {_any_of(_ABBREVIATIONS_WITH_CAPITAL.upper())}
        | (?:{_any_of(_ABBREVIATIONS_BEFORE_NUMBER)}|{_any_of(_ABBREVIATIONS_BEFORE_NUMBER.title())}) (?=\.\s*\d)
      ) \. (?:-{_W}+)*
    # Words that hold apostrophes, and the endings that are split off.
    | (?i: [dlon]'(?!(?:[sdm]|ll|re|ve)\b)[a-z]{{2,}} | c'mon | c'est | n?e'er | s'mores | ma'am | ol'
        | [jy]'(?=[a-z]) )
    | (?i: [a-z]+? (?=n{_APOSTROPHE}t(?![a-z])) | n{_APOSTROPHE}t(?![a-z]) )
    | {_APOSTROPHE} (?i:s|m|d|ll|re|ve) (?!{_W})
    | {_APOSTROPHE} (?: (?i:em|cause|til) | \d\ds? (?!{_W}|["”″]) )
    | ' (?i:t) (?=(?i:is|was)(?:\b|n{_APOSTROPHE}t))
    | {_APOSTROPHE} [nN] (?!{_W}) {_APOSTROPHE}?
    # Other words and numbers.
    | [A-Z]+ (?:&[A-Z]+)+
    | [CcFf]\# | [Cc]\+\+ | [A-Z]{{1,2}}\$
    | {_W}+ (?:[\-‐‑]{_W}+)* (?:/{_W}+ (?:[\-‐‑]{_W}+)*){{1,2}} (?!{_W})
    | {_W}+ (?:[\-‐‑_]{_W}+)+
    | {_W}* [^\W\d_] {_W}*
    | \d+ (?:[.,]\d+)+ (?:-{_W}+)+
    | (?<!\.\.) [\-+]? \d* (?:[.,:]\d+)+ | [\-+]? \d+
    # Marks that are not on the punctuation list.
    | [!?]{{2,}} | -{{5,}} | \*+ | _+ | \#+ | @+
    | [()\[\]{{}}$%&+/<=>\\^|~¡-£¥-©¬®-´¶-¹¼-¿×÷€‖‗‚„-•‰-‸※‾-⁂⁄⁰-ⁿ₀-₎℀-⅏⅕-⅞←-⯿、。〒・！-／：-＠［-｀｛-･￠￡￥￦]
    """,
    re.VERBOSE,
)
# What the Java program writes for some tokens, lower-cased: other characters, two tokens, or none that is kept.
_REWRITTEN = {
    token: tuple(written)
    for token, *written in map(
        str.split,
        """
        . / , / &quot; / &apos; / &nbsp; / &amp; & / &lt; < / &gt; > / £ # / € $ / ¢ cents
        ½ 1/2 / ¼ 1/4 / ¾ 3/4 / ⅓ 1/3 / ⅔ 2/3 / ( -lrb- / ) -rrb- / [ -lsb- / ] -rsb- / { -lcb- / } -rcb-
        ’s 's / ’m 'm / ’d 'd / ’ll 'll / ’re 're / ’ve 've / n’t n't
        cannot can not / gonna gon na / gotta got ta / wanna wan na / gimme gim me / lemme lem me
        """.strip()
        .replace("\n", " / ")
        .split(" / "),
    )
}
_REWRITTEN[" "] = ()
_WHITE_SPACE = re.compile(r"\s")
_SOFT_HYPHEN = "\u00ad"
_NO_BREAK_SPACE = "\u00a0"


def tokenize(caption: str) -> list[str]:
    """Returns the lower-case Penn Treebank tokens of a caption without punctuation, in order.

    A token holds no white space but a no-break space, where the Java program keeps "4 1/2" together.
    """
    text = caption.replace(_SOFT_HYPHEN, "").replace("\n", " ")
    tokens: list[str] = []
    for token in "\n".join(_LEXER.findall(text)).lower().split("\n"):
        written = _REWRITTEN.get(token)
        if written is not None:
            tokens += written
        elif token.isalnum():
            tokens.append(token)
        elif token:
            # Within markup, telephone numbers and smileys.
            token = _WHITE_SPACE.sub(_NO_BREAK_SPACE, token)
            tokens.append(token.replace("(", "-lrb-").replace(")", "-rrb-"))
    return tokens
