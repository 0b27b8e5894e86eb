"""First tokens of English texts, for models that would otherwise begin in any language."""

from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer

# Function words, a small closed class (ours; arXiv 2410.17170 uses spaCy's list of stop words).
_WORDS = """
a about above across after again against all almost along already also although always among an and another any anyone
anything are around as at away back be because been before behind being below between both but by can cannot could did
do does done down during each either else enough even ever every everyone everything few first for four from further
get give go had has have he her here hers herself him himself his how however i if in indeed instead into is it its
itself just last least less made make many may me might mine more most much must my myself neither never next nine no
nobody none nor not nothing now of off often on once one only onto or other others our ours out over own per perhaps
please put quite rather really same say see seem several she should since six so some someone something still such
take ten than that the their them themselves then there therefore these they third this those though three through
thus to together too toward two under until up upon us used very was we well were what whatever when where whether
which while who whole whose why will with within without would yet you your yours yourself
"""


def english_beginnings(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are a whole function word, in lower case or capitalized, with or without a space before.

    Words of several tokens are left out: alone, their first token is a bare space or the fragment of a word (ours; the
    paper does not say what it does with them).

    Raises:
        CalibrantError: the tokenizer has no such token.
    """
    words = _WORDS.split()
    forms = [(word, space + form) for word in words for form in (word, word.capitalize()) for space in ("", " ")]
    encoded = tokenizer.encode_batch([form for _, form in forms])
    found = {
        ids[0]
        for (word, _), ids in zip(forms, encoded, strict=True)
        if len(ids) == 1 and tokenizer.decode(ids).strip().lower() == word  # an unknown word is one token, too
    }
    if not found:
        raise CalibrantError(
            "no token of the tokenizer is a whole English function word, so no text can be made to begin with one; "
            'use `first_tokens="any"`'
        )
    return sorted(found)
