//! Tables as lines of words: bare words, and strings in `"…"` as `.tir` writes them.

use super::codec::ProgramError;

/// The words of one line, taken from left to right.
pub(in crate::program) struct Words<'a> {
    part: &'a str,
    number: usize,
    words: std::vec::IntoIter<String>,
}

impl<'a> Words<'a> {
    /// The words of every line of a part that is not empty.
    pub(in crate::program) fn lines(part: &'a str, text: &'a str) -> Result<Vec<Words<'a>>, ProgramError> {
        let mut lines = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let mut words = Words { part, number: number + 1, words: Vec::new().into_iter() };
            let split = split(line).ok_or_else(|| words.error("a string without end"))?;
            words.words = split.into_iter();
            lines.push(words);
        }
        Ok(lines)
    }

    pub(in crate::program) fn error(&self, what: impl Into<String>) -> ProgramError {
        ProgramError::Line { part: self.part.into(), line: self.number, what: what.into() }
    }

    pub(in crate::program) fn word(&mut self, what: &str) -> Result<String, ProgramError> {
        match self.words.next() {
            Some(word) => Ok(word),
            None => Err(self.error(format!("{what} is missing"))),
        }
    }

    pub(in crate::program) fn parse<T: std::str::FromStr>(&mut self, what: &str) -> Result<T, ProgramError> {
        let word = self.word(what)?;
        word.parse().map_err(|_| self.error(format!("`{word}` is not {what}")))
    }

    /// Everything that is left.
    pub(in crate::program) fn rest<T: std::str::FromStr>(
        &mut self,
        what: &str,
    ) -> Result<Vec<T>, ProgramError> {
        let mut all = Vec::new();
        while self.words.len() > 0 {
            all.push(self.parse(what)?);
        }
        Ok(all)
    }

    pub(in crate::program) fn is_done(&self) -> bool {
        self.words.len() == 0
    }

    pub(in crate::program) fn end(mut self) -> Result<(), ProgramError> {
        match self.words.next() {
            None => Ok(()),
            Some(word) => Err(self.error(format!("`{word}` follows the end"))),
        }
    }
}

fn split(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let Some(&first) = chars.peek() else { return Some(words) };
        let mut word = String::new();
        if first == '"' {
            chars.next();
            loop {
                match chars.next()? {
                    '"' => break,
                    '\\' => word.push(escaped(&mut chars)?),
                    c => word.push(c),
                }
            }
        } else {
            while let Some(c) = chars.next_if(|c| !c.is_whitespace()) {
                word.push(c);
            }
        }
        words.push(word);
    }
}

/// What follows a backslash: itself, or `u{hex}`.
fn escaped(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<char> {
    match chars.next()? {
        'u' if chars.next_if_eq(&'{').is_some() => {
            let mut code = 0u32;
            loop {
                match chars.next()? {
                    '}' => return char::from_u32(code),
                    digit => code = code.checked_mul(16)?.checked_add(digit.to_digit(16)?)?,
                }
            }
        }
        c => Some(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::quote;

    #[test]
    fn strings_come_back() {
        for text in ["", "plain", "two words", "\"q\" \\ \n\t\u{1}", "über"] {
            let line = format!("word {} 7", quote(text));
            let mut words = Words::lines("part", &line).unwrap().pop().unwrap();
            assert_eq!(words.word("word").unwrap(), "word");
            assert_eq!(words.word("text").unwrap(), text);
            assert_eq!(words.parse::<usize>("number").unwrap(), 7);
            words.end().unwrap();
        }
        assert!(Words::lines("part", "\"open").is_err());
        assert!(Words::lines("part", "\"\\u{110000}\"").is_err());
    }
}
