//! Rules as text, like an einsum: one letter per factor, `a*16` where a step is 16 elements of the dim, `.` for a dim no
//! factor splits, `a|b` where several factors lead it.

use super::{Factor, FactorDim, FactorResult, factors, linear_sets};
use std::fmt::Write;
use tpshard_ir::{Op, Type};

/// The row of the table for `op` on operands of these types.
pub fn rule_text(op: &Op, args: &[&Type], result: &Type) -> String {
    let rule = factors(op, args, result);
    let operand = |i: usize| {
        let of = move |f: &Factor| f.operands.get(i).cloned().flatten();
        shape_text(args[i].rank(), &rule, &of)
    };
    let operands: Vec<String> = (0..args.len()).map(operand).collect();
    let of_result =
        |f: &Factor| if let FactorResult::Dim(named) = &f.result { Some(named.clone()) } else { None };
    let mut text = format!("{} -> {}", operands.join(", "), shape_text(result.rank(), &rule, &of_result))
        .trim()
        .to_string();
    for (i, factor) in rule.iter().enumerate() {
        if let FactorResult::Reduced(monoid) = &factor.result {
            let _ = write!(text, "; {} {monoid}", letter(i));
        }
    }
    for set in linear_sets(op, args, result) {
        let members: Vec<String> =
            (0..args.len()).filter(|&i| set.operands[i]).map(|i| i.to_string()).collect();
        let _ = write!(text, "; P({}) in {}", set.monoid, members.join("&"));
    }
    text
}

fn letter(index: usize) -> char {
    char::from(b'a' + u8::try_from(index % 26).unwrap_or(0))
}

fn shape_text(rank: usize, rule: &[Factor], of: &dyn Fn(&Factor) -> Option<FactorDim>) -> String {
    let dims: Vec<String> = (0..rank)
        .map(|dim| {
            let leads: Vec<String> = rule
                .iter()
                .enumerate()
                .filter_map(|(i, factor)| {
                    let named = of(factor).filter(|f| f.dim == dim)?;
                    let times =
                        if named.inner.is_one() { String::new() } else { format!("*{}", named.inner) };
                    Some(format!("{}{times}", letter(i)))
                })
                .collect();
            if leads.is_empty() { ".".into() } else { leads.join("|") }
        })
        .collect();
    format!("[{}]", dims.join(" "))
}
