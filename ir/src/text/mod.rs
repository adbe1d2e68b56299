//! The text form `.tir` of graphs and programs: `parse(print(g)) == g`.
//!
//! One statement per line; line ends and spaces mean nothing, `;` starts a comment. A node is
//! `%7 = op {attribute=value, …} (%3, %5) : type @"origin"`, with its attributes in a fixed order:
//!
//! ```text
//! graph "two layers"
//! symbol seq 1..4096
//! guard past + seq <= 4096 "input `past`"
//! state "past.key" -> "present.key" axis 2
//! %0 = input "x" : f32[seq, 4]
//! %1 = weight init("w", f32, [4, 8]) |> slice(1, 0, 4) : f32[4, 4]
//! %2 = einsum "sk,kn->sn" (%0, %1) : f32[seq, 4] @"/MatMul"
//! output "y" %2
//! ```
//!
//! A program follows the graph it is for with `mesh`, `imported`, `equation`, steps and `result` lines:
//!
//! ```text
//! mesh [4]
//! imported 3
//! equation "double negation" %0 = %4
//! $0 = %2 : P(sum) compute ($3, $5)
//! $1 = %2 : R all_reduce {axes=[0], monoid=sum} ($0)
//! result "y" $1
//! ```
//!
//! What must not live here: meaning. Parsed text is well formed, not verified.

mod dims;
mod literal;
mod op;
mod parse;
mod print;
mod scan;

pub use parse::{parse_dim, parse_graph, parse_literal, parse_program};
pub use print::{print_graph, print_literal, print_program};

/// Where text is not what was expected there.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{line}:{column}: {what}")]
pub struct TextError {
    pub line: usize,
    pub column: usize,
    pub what: String,
}

/// Text in `"…"`, with `"`, `\` and control characters escaped.
pub fn quote(text: &str) -> String {
    quote_with('"', text)
}

pub(crate) fn quote_with(mark: char, text: &str) -> String {
    let mut quoted = String::from(mark);
    for c in text.chars() {
        if c == mark || c == '\\' {
            quoted.push('\\');
            quoted.push(c);
        } else if c.is_control() {
            quoted.push_str(&format!("\\u{{{:x}}}", u32::from(c)));
        } else {
            quoted.push(c);
        }
    }
    quoted.push(mark);
    quoted
}
