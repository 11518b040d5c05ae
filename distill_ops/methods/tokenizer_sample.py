"""Texts on which two tokenizers are compared: several scripts, emoji, whitespace, and Python sources."""

import sysconfig
from pathlib import Path

__all__ = ["sample_texts"]

HEAD = (
    1000  # characters of each source: more finds no more, and a slow tokenizer reads some 100 kB/s
)

TEXTS = {
    "English": "I'll say it once: we've DON'T, they'D, O'Dell 'Tis and l'été. The (quick) brown fox; jumps--over!?",
    "numbers": "0 1 12 123 1234 12345678901234567890 3.14159 1,000,000.00 1e-10 0xFF ½ ² Ⅷ ٣٤ १२",
    "accents, composed": "Zażółć gęślą jaźń, façade, Größe, naïve, El niño",
    "accents, combining": "Zaz\u0307o\u0301łc\u0301, fac\u0327ade, Gro\u0308ße, nai\u0308ve, El nin\u0303o",
    "cases": "İstanbul ISTANBUL ıI ﬁ ﬃ ＡＢＣ １２３ ŉ ǅ ς Σ ß ẞ K \u212a \u2126",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
    "Cyrillic": "Все люди рождаются свободными и равными. Її, ґанок.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים.",
    "Devanagari": "सभी मनुष्य स्वतंत्र और समान जन्म लेते हैं।",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。𠮷野家，繁體字",
    "Japanese": "すべての人間は、生まれながらにして自由である。ｶﾀｶﾅ",
    "Korean": "모든 인간은 태어날 때부터 자유롭다. \u1112\u1161\u11ab",
    "emoji": "😀👍🏽👩‍👩‍👧‍👦🇩🇪🏳️‍🌈❤️ x🙂y 1️⃣",
    "mathematics": "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β = ¬(¬α∨β), ∑ᵢ xᵢ² ≥ 0, 𝔸𝒷",
    "whitespace": " a  b   c\td\t\te\n\nf \r\n g\n   h    \u00a0i\u2003j\u3000k\u200bl\u2028m\x0bn\x0c ",
    "spaces alone": "        ",
    "ends": "\n\tdef f():\n\t\treturn 1  \n",
    "controls": "a\x00b\x07c\x7fd\u0085e\ufefff\u200eg\ufffdh\u00adi",
    "repetition": "a" * 80 + " " + "=" * 70 + "\n" + "#" * 66 + "!?" * 30 + " .." * 20,
    "markup": '<p class="a">x &amp; y</p> [k] {"k": [1, null]} C:\\n\\t \\u00e9 http://a.b/c?d=e#f',
}


def sample_texts() -> dict[str, str]:
    """Texts by name, on which tokenizers are likely to differ where they are not the same.

    Strings ``{name: text}``; in all some 20 short ones and the heads of this Python's own sources.
    Nothing goes in, and a new ``dict[str, str]`` comes out; nothing is downloaded.

    Example:
        >>> from distill_ops.methods.tokenizers import sample_texts
        >>> texts = sample_texts()
        >>> texts["spaces alone"]
        '        '
        >>> own = {**texts, "mine": "what the models will read"}  # for check_same_tokenizer(texts=own)

    Of the sources it takes the first 1000 characters of every module at the top of the standard library that
    is there as a file, the text ``"Python sources"``; without any, that text is left out.
    """
    texts = dict(TEXTS)
    library = Path(sysconfig.get_path("stdlib"))
    sources = [
        path.read_text(encoding="utf-8", errors="replace")[:HEAD]
        for path in sorted(library.glob("*.py"))
    ]
    if sources:
        texts["Python sources"] = "\n".join(sources)
    return texts
