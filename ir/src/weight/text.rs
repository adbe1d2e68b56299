//! The text form of weight expressions: a pipeline read from left to right.
//!
//! `expression := source ("|>" step)*`, `source := init(name, dtype, dims) | concat(expression, …; axis)`. Spaces between
//! tokens do not matter; the printer writes one form only.

use super::{MAX_DEPTH, WeightExpr, WeightExprError, WeightKind};
use crate::DType;
use std::fmt::{self, Display, Formatter, Write};
use std::str::FromStr;

/// Why text is not a weight expression, and at which byte of it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseWeightError {
    #[error("weight expression, byte {at}: expected {expected}")]
    Expected { at: usize, expected: &'static str },
    #[error("weight expression, byte {at}: {error}")]
    Invalid { at: usize, error: WeightExprError },
}

impl Display for WeightExpr {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.kind() {
            WeightKind::Initializer { name } => {
                f.write_str("init(")?;
                quote(f, name)?;
                write!(f, ", {}, {:?})", self.dtype(), self.shape())
            }
            WeightKind::Concat { sources, axis } => {
                f.write_str("concat(")?;
                for (index, source) in sources.iter().enumerate() {
                    if index > 0 {
                        f.write_str(", ")?;
                    }
                    source.fmt(f)?;
                }
                write!(f, "; {axis})")
            }
            WeightKind::Slice { source, axis, start, length } => {
                write!(f, "{source} |> slice({axis}, {start}, {length})")
            }
            WeightKind::Transpose { source, perm } => write!(f, "{source} |> transpose({perm:?})"),
            WeightKind::Reshape { source } => write!(f, "{source} |> reshape({:?})", self.shape()),
            WeightKind::Cast { source } => write!(f, "{source} |> cast({})", self.dtype()),
        }
    }
}

fn quote(f: &mut Formatter<'_>, name: &str) -> fmt::Result {
    f.write_char('"')?;
    for c in name.chars() {
        match c {
            '"' | '\\' => write!(f, "\\{c}")?,
            c if c.is_control() => write!(f, "\\u{{{:x}}}", u32::from(c))?,
            c => f.write_char(c)?,
        }
    }
    f.write_char('"')
}

impl FromStr for WeightExpr {
    type Err = ParseWeightError;

    fn from_str(text: &str) -> Result<Self, ParseWeightError> {
        let mut parser = Parser { text, at: 0 };
        let expr = parser.expression(0)?;
        parser.spaces();
        if parser.at == text.len() { Ok(expr) } else { Err(parser.expected("`|>` or the end")) }
    }
}

impl WeightExpr {
    /// The expression that `text` starts with, and how many bytes it takes.
    pub(crate) fn parse_prefix(text: &str) -> Result<(WeightExpr, usize), ParseWeightError> {
        let mut parser = Parser { text, at: 0 };
        let expr = parser.expression(0)?;
        Ok((expr, parser.at))
    }
}

impl ParseWeightError {
    /// The message without the place.
    pub(crate) fn reason(&self) -> String {
        match self {
            ParseWeightError::Expected { expected, .. } => format!("expected {expected}"),
            ParseWeightError::Invalid { error, .. } => error.to_string(),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

type Parsed<T> = Result<T, ParseWeightError>;

impl<'a> Parser<'a> {
    fn expression(&mut self, depth: usize) -> Parsed<WeightExpr> {
        if depth > MAX_DEPTH {
            return Err(ParseWeightError::Invalid { at: self.at, error: WeightExprError::TooDeep });
        }
        let mut expr = self.source(depth)?;
        while self.eat("|>") {
            let at = self.at;
            expr = self.step(&expr)?.map_err(|error| ParseWeightError::Invalid { at, error })?;
        }
        Ok(expr)
    }

    fn source(&mut self, depth: usize) -> Parsed<WeightExpr> {
        let at = self.at;
        let built = match self.word() {
            "init" => {
                self.need("(", "`(`")?;
                let name = self.quoted()?;
                self.need(",", "`,`")?;
                let dtype = self.dtype()?;
                self.need(",", "`,`")?;
                let shape = self.list()?;
                WeightExpr::initializer(name, dtype, shape)
            }
            "concat" => {
                self.need("(", "`(`")?;
                let mut sources = vec![self.expression(depth + 1)?];
                while self.eat(",") {
                    sources.push(self.expression(depth + 1)?);
                }
                self.need(";", "`,` or `;`")?;
                WeightExpr::concat(sources, self.number()?)
            }
            _ => return Err(ParseWeightError::Expected { at, expected: "`init` or `concat`" }),
        };
        self.need(")", "`)`")?;
        built.map_err(|error| ParseWeightError::Invalid { at, error })
    }

    fn step(&mut self, source: &WeightExpr) -> Parsed<Result<WeightExpr, WeightExprError>> {
        self.spaces();
        let at = self.at;
        let word = self.word();
        self.need("(", "`slice(`, `transpose(`, `reshape(` or `cast(`")?;
        let built = match word {
            "slice" => {
                let axis = self.number()?;
                self.need(",", "`,`")?;
                let start = self.number()?;
                self.need(",", "`,`")?;
                source.slice(axis, start, self.number()?)
            }
            "transpose" => source.transpose(self.list()?),
            "reshape" => source.reshape(self.list()?),
            "cast" => source.cast(self.dtype()?),
            _ => {
                let expected = "`slice`, `transpose`, `reshape` or `cast`";
                return Err(ParseWeightError::Expected { at, expected });
            }
        };
        self.need(")", "`)`")?;
        Ok(built)
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn expected(&self, expected: &'static str) -> ParseWeightError {
        ParseWeightError::Expected { at: self.at, expected }
    }

    fn spaces(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn eat(&mut self, token: &str) -> bool {
        self.spaces();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn need(&mut self, token: &str, expected: &'static str) -> Parsed<()> {
        if self.eat(token) { Ok(()) } else { Err(self.expected(expected)) }
    }

    /// The letters and digits that follow.
    fn word(&mut self) -> &'a str {
        self.spaces();
        let rest = self.rest();
        let length = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        self.at += length;
        rest.get(..length).unwrap_or_default()
    }

    fn number(&mut self) -> Parsed<usize> {
        self.spaces();
        let error = self.expected("a number");
        let word = self.word();
        if word.bytes().all(|byte| byte.is_ascii_digit()) {
            word.parse().map_err(|_| error)
        } else {
            Err(error)
        }
    }

    fn dtype(&mut self) -> Parsed<DType> {
        self.spaces();
        let error = self.expected("an element type");
        self.word().parse().map_err(|_| error)
    }

    fn list(&mut self) -> Parsed<Vec<usize>> {
        self.need("[", "`[`")?;
        let mut numbers = Vec::new();
        if self.eat("]") {
            return Ok(numbers);
        }
        loop {
            numbers.push(self.number()?);
            if !self.eat(",") {
                self.need("]", "`,` or `]`")?;
                return Ok(numbers);
            }
        }
    }

    fn quoted(&mut self) -> Parsed<String> {
        self.need("\"", "`\"`")?;
        let mut name = String::new();
        loop {
            let Some(c) = self.next() else { return Err(self.expected("`\"`")) };
            match c {
                '"' => return Ok(name),
                '\\' => name.push(self.escaped()?),
                c => name.push(c),
            }
        }
    }

    fn escaped(&mut self) -> Parsed<char> {
        let error = self.expected("`\\`, `\"` or `u{…}` after `\\`");
        match self.next() {
            Some(c @ ('"' | '\\')) => Ok(c),
            Some('u') => {
                let inner = self.rest().strip_prefix('{').and_then(|rest| rest.split_once('}'));
                let Some((digits, _)) = inner else { return Err(error) };
                self.at += digits.len() + 2;
                u32::from_str_radix(digits, 16).ok().and_then(char::from_u32).ok_or(error)
            }
            _ => Err(error),
        }
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        for text in [
            r#"init("w", f32, [64, 192]) |> slice(1, 0, 64) |> transpose([1, 0])"#,
            r#"concat(init("k", f16, [8, 64]), init("v", f16, [8, 64]) |> slice(0, 1, 2); 0) |> reshape([10, 2, 32]) |> cast(f32)"#,
            r#"init("a \"b\" \\c\u{a}é/·", u4, [])"#,
            r#"init("", i2, [0]) |> reshape([0, 4])"#,
            r#"concat(concat(init("a", bool, [1]); 0), init("b", bool, [2]); 0)"#,
        ] {
            let expr: WeightExpr = text.parse().unwrap();
            assert_eq!(expr.to_string(), text);
        }
        let spaced: WeightExpr = " init ( \"w\" ,f32,[ 2,3 ] )|>cast(f16) ".parse().unwrap();
        assert_eq!(spaced.to_string(), r#"init("w", f32, [2, 3]) |> cast(f16)"#);
    }

    #[test]
    fn every_prefix_of_good_text_is_handled() {
        let text = r#"concat(init("é\u{a}", f16, [8, 64]), init("v", f16, [8, 64]) |> slice(0, 1, 2); 0) |> cast(f32)"#;
        for end in (0..text.len()).filter(|&end| text.is_char_boundary(end)) {
            let parsed = text[..end].parse::<WeightExpr>();
            let complete = text[end..].trim_start().starts_with("|> cast") && !text[..end].contains("|> c");
            assert_eq!(parsed.is_ok(), complete && text[..end].contains("; 0)"), "{}", &text[..end]);
        }
    }

    #[test]
    fn errors_name_the_place() {
        let parse = |text: &str| text.parse::<WeightExpr>().unwrap_err().to_string();
        assert_eq!(parse("w"), "weight expression, byte 0: expected `init` or `concat`");
        assert_eq!(parse(r#"init("w", f33, [1])"#), "weight expression, byte 10: expected an element type");
        assert_eq!(parse(r#"init("w", f32, [-1])"#), "weight expression, byte 16: expected a number");
        assert_eq!(parse(r#"init("w", f32, [+1])"#), "weight expression, byte 16: expected a number");
        assert_eq!(
            parse(r#"init("w", f32, [4]) |> slice(0, 3, 2)"#),
            "weight expression, byte 22: 2 entries from 3 of axis 0 of a weight of shape [4]"
        );
        assert!(parse(r#"init("w", f32, [99999999999999999999])"#).contains("a number"));
        assert!(parse(r#"init("w", f32, [4]) x"#).contains("the end"));
        assert!(parse(r#"init("\u{d800}", f32, [4])"#).contains("after"));
    }

    #[test]
    fn deep_nesting_is_refused_without_recursing() {
        assert!("concat(".repeat(100_000).parse::<WeightExpr>().is_err());
        let pipeline = format!("init(\"w\", f32, [1]){}", " |> cast(f32)".repeat(10_000));
        assert!(pipeline.parse::<WeightExpr>().is_err());
    }
}
