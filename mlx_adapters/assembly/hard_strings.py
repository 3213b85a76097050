"""Strings on which tokenizers differ."""

from collections.abc import Sequence


def hard_strings(special: Sequence[str]) -> list[str]:
    """A hundred strings on which tokenizers differ: spaces, digits, contractions, scripts, marks, code, `special`."""
    words = ["a", "I'm", "don't stop", "WE'LL", "it’s", "naïve café", "O'Neill's", "x'S", "HTMLParser", "camelCaseWord"]
    digits = ["1", "12", "123", "1234", "12345678", "3.14159", "1,000,000", "0x7fff", "a1b22c333", "٣٤٥", "½ ²³"]
    spaces = [
        " ",
        "  ",
        "   x",
        "x   ",
        " x  y ",
        "\n",
        "\n\n",
        "\r\n",
        " \n x",
        "\t\tif x:\n\t\t\ty",
        "a\u00a0b",
        "\u2003x",
    ]
    scripts = [
        "中文字符测试",
        "こんにちは、世界。",
        "한국어 문장",
        "Привет, мир!",
        "Ελληνικά",
        "שלום עולם",
        "مرحبا بالعالم",
        "हिन्दी भाषा",
        "ไทยไม่มีช่องว่าง",
        "Tiếng Việt",
        "ÀÉÎÕÜ",
        "straße STRASSE ẞ",
        "ǅungla",
        "ﬁne ligature",
        "Ⅷ",
    ]
    marks = [
        "!?",
        "...",
        "…",
        "--",
        "—",
        "“quotes”",
        "a,b;c:d",
        "(x)[y]{z}",
        "@user #tag",
        "50%",
        "$9.99",
        "€5",
        "C++",
        "a/b//c",
    ]
    emoji = ["🙂", "👩‍👩‍👧", "🇩🇪", "x🙂y", "✅ done", "♥️", "\u200b", "\ufeffx", "a\u200db", "e\u0301"]
    code = [
        "def f(x):\n    return x**2\n",
        "for (int i=0;i<n;++i){a[i]+=1;}",
        "SELECT * FROM t WHERE a='b' -- c",
        '<div class="x">y</div>',
        '{"k": [1, 2.5, null]}',
        "https://example.org/a?b=c&d=%20",
        "C:\\dir\\file.txt",
        "`x` ```py\ny\n```",
        "a\\n\\tb",
        "#!/bin/sh\necho $HOME",
        "\\frac{a}{b}",
        "x = y if z else -1e-5",
    ]
    text = [
        "The quick brown fox jumps over the lazy dog.",
        "Hello, world!\n\nHow are you?",
        "1. One\n2. Two\n\n- three",
        "    indented\n  less\nnone",
        "UPPER lower MiXeD",
        "end with space ",
        " begin",
        "tab\tand\nline",
        "a b c d e f g",
        "supercalifragilisticexpialidocious",
        "x" * 50,
        "ha" * 20,
        "1" * 20,
        " " * 20 + "x",
        "\n" * 8,
        "_snake_case_",
    ]
    marked = [form for token in special[:4] for form in (token, f"x{token}y", f"{token}\n{token}", f" {token} ")]
    return [*words, *digits, *spaces, *scripts, *marks, *emoji, *code, *text, *marked]
