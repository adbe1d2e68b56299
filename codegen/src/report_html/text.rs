//! Text that a model chose, made harmless: escaped, cut, and without characters that reorder what is around them.

use std::fmt::{self, Write};

/// Most characters of a text that are shown.
const LONGEST: usize = 160;

/// Shows a text in HTML, in elements and quoted attributes alike.
pub(super) struct Text<'a>(pub(super) &'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars().take(LONGEST) {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c if c.is_control() || reorders(c) => f.write_char('\u{fffd}')?,
                c => f.write_char(c)?,
            }
        }
        if self.0.chars().nth(LONGEST).is_some() { f.write_char('…') } else { Ok(()) }
    }
}

/// True for the marks that change the direction of text.
fn reorders(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_place() {
        let text = Text("<script>alert('1')</script> & \"q\"").to_string();
        assert_eq!(text, "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;q&quot;");
        assert_eq!(Text("a\0b\u{202e}c\n").to_string(), "a\u{fffd}b\u{fffd}c\u{fffd}");
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(Text(&"ä".repeat(160)).to_string(), "ä".repeat(160));
        assert_eq!(Text(&"ä".repeat(1 << 20)).to_string(), format!("{}…", "ä".repeat(160)));
        assert_eq!(Text(&"<".repeat(200)).to_string(), format!("{}…", "&lt;".repeat(160)));
    }
}
