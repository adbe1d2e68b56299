//! Reading text from left to right.

use super::TextError;
use crate::weight::{ParseWeightError, WeightExpr};

pub(super) type Parsed<T> = Result<T, TextError>;

/// A place in text; every method skips spaces and comments before it looks.
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Scanner<'a> {
        Scanner { text, at: 0 }
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// The place of the next token.
    pub(super) fn place(&mut self) -> usize {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if !trimmed.starts_with(';') {
                return self.at;
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
    }

    pub(super) fn at_end(&mut self) -> bool {
        self.place() >= self.text.len()
    }

    pub(super) fn error_at(&self, at: usize, what: impl Into<String>) -> TextError {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        TextError { line: before.matches('\n').count() + 1, column, what: what.into() }
    }

    /// `expected …, found …` at the next token.
    pub(super) fn expected(&mut self, expected: &str) -> TextError {
        let at = self.place();
        let mut found: String = self.rest().chars().take_while(|c| !c.is_whitespace()).take(24).collect();
        found = if found.is_empty() { "the end".into() } else { format!("`{found}`") };
        self.error_at(at, format!("expected {expected}, found {found}"))
    }

    pub(super) fn peek(&mut self, token: &str) -> bool {
        self.place();
        self.rest().starts_with(token)
    }

    pub(super) fn eat(&mut self, token: &str) -> bool {
        let found = self.peek(token);
        if found {
            self.at += token.len();
        }
        found
    }

    pub(super) fn need(&mut self, token: &str) -> Parsed<()> {
        if self.eat(token) { Ok(()) } else { Err(self.expected(&format!("`{token}`"))) }
    }

    /// The word that follows, without taking it; empty if there is none.
    pub(super) fn peek_word(&mut self) -> &'a str {
        self.place();
        let rest = self.rest();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let length = rest.find(|c| !plain(c)).unwrap_or(rest.len());
        rest.get(..length).unwrap_or_default()
    }

    /// The word that follows if it starts with a letter or `_`.
    pub(super) fn word(&mut self, expected: &str) -> Parsed<&'a str> {
        let word = self.peek_word();
        if !word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return Err(self.expected(expected));
        }
        self.at += word.len();
        Ok(word)
    }

    pub(super) fn eat_word(&mut self, word: &str) -> bool {
        let found = self.peek_word() == word;
        if found {
            self.at += word.len();
        }
        found
    }

    pub(super) fn need_word(&mut self, word: &str) -> Parsed<()> {
        if self.eat_word(word) { Ok(()) } else { Err(self.expected(&format!("`{word}`"))) }
    }

    /// Digits, as a number that fits.
    pub(super) fn number<T: std::str::FromStr>(&mut self) -> Parsed<T> {
        self.place();
        let rest = self.rest();
        let length = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let digits = rest.get(..length).unwrap_or_default();
        let Ok(number) = digits.parse() else { return Err(self.expected("a number in range")) };
        self.at += length;
        Ok(number)
    }

    /// As [`Scanner::number`], with an optional `-` before it.
    pub(super) fn signed(&mut self) -> Parsed<i64> {
        let start = self.place();
        let negative = self.eat("-");
        let magnitude: u64 = self.number()?;
        let value = if negative { -i128::from(magnitude) } else { i128::from(magnitude) };
        i64::try_from(value).map_err(|_| self.error_at(start, format!("{value} does not fit 64 bits")))
    }

    /// The characters of a floating-point number, a hexadecimal code, `inf` or `-inf`.
    pub(super) fn numeral(&mut self) -> &'a str {
        self.place();
        let rest = self.rest();
        let part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-');
        let length = rest.find(|c| !part(c)).unwrap_or(rest.len());
        self.at += length;
        rest.get(..length).unwrap_or_default()
    }

    pub(super) fn real(&mut self) -> Parsed<f64> {
        let start = self.place();
        let text = self.numeral();
        let value = match text.strip_prefix("0x") {
            Some(bits) => u64::from_str_radix(bits, 16).ok().map(f64::from_bits),
            None => text.parse().ok(),
        };
        value.ok_or_else(|| self.error_at(start, "expected a real number"))
    }

    pub(super) fn boolean(&mut self) -> Parsed<bool> {
        if self.eat_word("true") {
            return Ok(true);
        }
        if self.eat_word("false") { Ok(false) } else { Err(self.expected("`true` or `false`")) }
    }

    /// `open item, … close`.
    pub(super) fn list<T>(
        &mut self,
        open: &str,
        close: &str,
        mut item: impl FnMut(&mut Scanner<'a>) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        self.need(open)?;
        let mut items = Vec::new();
        if self.eat(close) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if !self.eat(",") {
                if self.eat(close) {
                    return Ok(items);
                }
                return Err(self.expected(&format!("`,` or `{close}`")));
            }
        }
    }

    /// Text between two `mark`s, unescaped.
    pub(super) fn quoted(&mut self, mark: char) -> Parsed<String> {
        let start = self.place();
        let mut chars = self.rest().char_indices();
        if chars.next().map(|(_, c)| c) != Some(mark) {
            return Err(self.expected(&format!("`{mark}`")));
        }
        let mut text = String::new();
        while let Some((i, c)) = chars.next() {
            if c == mark {
                self.at += i + c.len_utf8();
                return Ok(text);
            }
            if c != '\\' {
                text.push(c);
                continue;
            }
            let escaped = match chars.next().map(|(_, c)| c) {
                Some('u') => unicode(&mut chars),
                Some(c) if c == mark || c == '\\' => Some(c),
                _ => None,
            };
            let Some(escaped) = escaped else {
                return Err(self.error_at(start + i, "expected `\\\\`, `\\u{…}` or an escaped quote"));
            };
            text.push(escaped);
        }
        Err(self.error_at(start, format!("expected a closing `{mark}`")))
    }

    pub(super) fn string(&mut self) -> Parsed<String> {
        self.quoted('"')
    }

    pub(super) fn weight(&mut self) -> Parsed<WeightExpr> {
        let start = self.place();
        match WeightExpr::parse_prefix(self.rest()) {
            Ok((expr, length)) => {
                self.at += length;
                Ok(expr)
            }
            Err(error) => {
                let (ParseWeightError::Expected { at, .. } | ParseWeightError::Invalid { at, .. }) = &error;
                Err(self.error_at(start + at, error.reason()))
            }
        }
    }
}

/// The character of `{hex}`.
fn unicode(chars: &mut std::str::CharIndices<'_>) -> Option<char> {
    let (_, '{') = chars.next()? else { return None };
    let mut code = 0u32;
    for (_, c) in chars.by_ref() {
        if c == '}' {
            return char::from_u32(code);
        }
        code = code.checked_mul(16)?.checked_add(c.to_digit(16)?)?;
    }
    None
}
