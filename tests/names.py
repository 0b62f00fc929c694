"""Class names as they are found in data, that are no good file names, formulas or table rows."""

NAMES = (
    "car",
    "../../escaped",
    "x/../../../y",
    "/etc/passwd",
    "..",
    "a\\b",
    "50 %",
    "50%2F",
    "50/",
    "$10",
    "$\\frac{1}$",
    "<script>alert(1)</script>",
    "n" * 300,
    "n" * 301,
    "\N{CJK UNIFIED IDEOGRAPH-732B}" * 120,
    "\N{ARABIC LETTER BEH}\N{RIGHT-TO-LEFT OVERRIDE}x",
    "_private",
    "nul\0byte",
    "CON:",
)
