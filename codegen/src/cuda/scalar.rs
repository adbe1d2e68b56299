//! Scalar functions as C expressions, with the results of the reference interpreter.
//!
//! Floats of 16 and 32 bits are computed as `float`, integers as 64 bits and wrapped to their type after each function.

use super::text::wide_type;
use tpshard_ir::{DType, DTypeClass, Scalar};

/// True if [`expression`] knows `scalar` on operands of type `from` with results of type `to`.
pub(super) fn is_known(scalar: Scalar, from: DType, to: DType) -> bool {
    let computed = |d: DType| {
        !d.is_packed() && (!d.is_float() || matches!(d, DType::F32 | DType::F16 | DType::BF16 | DType::F64))
    };
    let float = from.is_float();
    let int = from.is_integer();
    if !(computed(from) || from.is_packed() && int) || !computed(to) {
        return false;
    }
    use Scalar as S;
    match scalar {
        S::Bits(_) => false,
        S::Cast(_) | S::Select | S::Not | S::And | S::Or | S::Xor | S::Equal => true,
        S::Less | S::LessEqual | S::Greater | S::GreaterEqual => float || int,
        S::Neg | S::Abs | S::Sign | S::Add | S::Sub | S::Mul | S::Min | S::Max => float || int,
        S::Div | S::Mod | S::Rem => float || int && from != DType::U64,
        S::BitNot | S::BitAnd | S::BitOr | S::BitXor => int,
        S::ShiftLeft | S::ShiftRight => int,
        S::Pow
        | S::Reciprocal
        | S::Sqrt
        | S::Rsqrt
        | S::Exp
        | S::Log
        | S::Sin
        | S::Cos
        | S::Tan
        | S::Asin
        | S::Acos
        | S::Atan
        | S::Sinh
        | S::Cosh
        | S::Asinh
        | S::Acosh
        | S::Atanh
        | S::Tanh
        | S::Sigmoid
        | S::Erf
        | S::Floor
        | S::Ceil
        | S::Round
        | S::IsNan
        | S::IsInf => float,
    }
}

/// True if the function takes the arguments that name a fault.
pub(super) fn may_fault(scalar: Scalar, from: DType) -> bool {
    matches!(scalar, Scalar::Div | Scalar::Mod | Scalar::Rem) && from.is_integer()
}

/// `scalar` of `args`, which have type `from`, as an expression of the wide type of `to`; `fault` are the arguments of
/// functions that may meet one.
pub(super) fn expression(scalar: Scalar, from: DType, to: DType, args: &[&str], fault: &str) -> String {
    let value = match args {
        [a] => unary(scalar, from, a),
        [a, b] => binary(scalar, from, a, b, fault),
        [c, a, b] => format!("{c} ? {a} : {b}"),
        _ => String::new(),
    };
    if to.is_integer() { wrapped(to, value) } else { value }
}

/// An integer of 64 bits, cut to its type.
fn wrapped(to: DType, value: String) -> String {
    let narrow = match to {
        DType::I8 => "signed char",
        DType::I16 => "short",
        DType::I32 => "int",
        DType::U8 => "unsigned char",
        DType::U16 => "unsigned short",
        DType::U32 => "unsigned",
        _ => return value,
    };
    format!("({narrow})({value})")
}

/// The name of a function of C's mathematics for `dtype`.
fn function(name: &str, dtype: DType) -> String {
    if dtype == DType::F64 { name.into() } else { format!("{name}f") }
}

fn unary(scalar: Scalar, from: DType, a: &str) -> String {
    let call = |name: &str| format!("{}({a})", function(name, from));
    let one = if from == DType::F64 { "1.0" } else { "1.0f" };
    match scalar {
        Scalar::Cast(to) => cast(from, to, a),
        Scalar::Neg if from.is_float() => format!("-{a}"),
        Scalar::Neg => format!("subtract(({})0, {a})", wide_type(from)),
        Scalar::Abs if from.is_float() => call("fabs"),
        Scalar::Abs if from.class() == DTypeClass::Uint => a.into(),
        Scalar::Abs => format!("{a} < 0 ? subtract((i64)0, {a}) : {a}"),
        Scalar::Sign => format!("sign({a})"),
        Scalar::Reciprocal => format!("{one} / {a}"),
        Scalar::Rsqrt => format!("{one} / {}", call("sqrt")),
        Scalar::Sigmoid => format!("sigmoid({a})"),
        Scalar::Round => call("rint"),
        Scalar::IsNan => format!("{a} != {a}"),
        Scalar::IsInf => format!("infinite({a})"),
        Scalar::Not => format!("!{a}"),
        Scalar::BitNot => format!("~{a}"),
        other => call(other.name()),
    }
}

fn binary(scalar: Scalar, from: DType, a: &str, b: &str, fault: &str) -> String {
    let float = from.is_float();
    let operator = |text: &str| format!("{a} {text} {b}");
    let call = |name: &str| format!("{name}({a}, {b})");
    let faulting = |name: &str| format!("{name}({a}, {b}, {fault})");
    let bits = from.bits();
    match scalar {
        Scalar::Add if float => operator("+"),
        Scalar::Sub if float => operator("-"),
        Scalar::Mul if float => operator("*"),
        Scalar::Div if float => operator("/"),
        Scalar::Add => call("add"),
        Scalar::Sub => call("subtract"),
        Scalar::Mul => call("multiply"),
        Scalar::Div => faulting("divide"),
        Scalar::Pow => call("power"),
        Scalar::Min => call("minimum"),
        Scalar::Max => call("maximum"),
        Scalar::Mod if float => call("modulo"),
        Scalar::Rem if float => format!("{}({a}, {b})", function("fmod", from)),
        Scalar::Mod => faulting("modulo"),
        Scalar::Rem => faulting("remainder_of"),
        Scalar::And => operator("&&"),
        Scalar::Or => operator("||"),
        Scalar::Xor => operator("!="),
        Scalar::BitAnd => operator("&"),
        Scalar::BitOr => operator("|"),
        Scalar::BitXor => operator("^"),
        Scalar::ShiftLeft => format!("(u64){b} < {bits} ? (i64)((u64){a} << {b}) : 0"),
        Scalar::ShiftRight if from == DType::U64 => format!("{b} < {bits} ? {a} >> {b} : 0"),
        Scalar::ShiftRight => format!("{a} >> ((u64){b} < {bits} ? {b} : 63)"),
        Scalar::Equal => operator("=="),
        Scalar::Less => operator("<"),
        Scalar::LessEqual => operator("<="),
        Scalar::Greater => operator(">"),
        Scalar::GreaterEqual => operator(">="),
        _ => String::new(),
    }
}

/// `a` of type `from` in the wide type of `to`, before integers are cut and floats rounded.
fn cast(from: DType, to: DType, a: &str) -> String {
    match (from.is_float(), to) {
        (_, DType::Bool) => format!("{a} != 0"),
        (true, DType::U64) => format!("to_u64({a})"),
        (true, DType::I64 | DType::U32) => format!("to_64_bits({a})"),
        (true, _) if to.is_integer() => format!("to_32_bits({a})"),
        _ => format!("({}){a}", wide_type(to)),
    }
}

/// A float rounded to a type of 16 bits.
pub(super) fn rounded(dtype: DType, value: &str) -> String {
    match dtype {
        DType::F16 => format!("as_f16({value})"),
        DType::BF16 => format!("as_bf16({value})"),
        _ => value.into(),
    }
}
