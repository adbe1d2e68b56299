//! Elementwise functions of values that may be known: constants and sizes are computed here, index grids stay grids,
//! and what is left becomes [`Op::Map`](tpshard_ir::Op::Map).

use super::context::{Lowered, Lowering, invalid};
use super::symbols::never_equal;
use super::value::{Affine, Element, Known, Value, fits, round_to, strides_of, unflatten};
use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;
use tpshard_ir::{DType, DTypeClass, Dim, Scalar};

impl Lowering<'_> {
    /// `scalar(args…)` with NumPy broadcasting, folded where it can be.
    pub(crate) fn elementwise(&mut self, scalar: Scalar, args: &[Value]) -> Lowered<Value> {
        if let Some(value) = self.neutral(scalar, args) {
            return Ok(value);
        }
        if let Some(affine) = self.affine_function(scalar, args)? {
            return Ok(Value::Affine(Arc::new(affine)));
        }
        if let Some(known) = self.fold_function(scalar, args)? {
            return Ok(Value::Known(Arc::new(known)));
        }
        if let (Scalar::Cast(to), [Value::Weight(expr)]) = (scalar, args)
            && let Ok(cast) = expr.cast(to)
        {
            return Ok(Value::Weight(cast));
        }
        let mut data = Vec::with_capacity(args.len());
        for arg in args {
            data.push(self.data(arg)?);
        }
        let data = self.stretched_operands(&data)?;
        Ok(Value::Data(self.map(scalar, &data)?))
    }

    pub(crate) fn cast_value(&mut self, value: &Value, dtype: DType) -> Lowered<Value> {
        self.elementwise(Scalar::Cast(dtype), std::slice::from_ref(value))
    }

    /// `x * 1`, `x / 1`, `x and true`, `x or false`, a cast to the type that is there: `x`, if the other operand does
    /// not stretch it.
    fn neutral(&self, scalar: Scalar, args: &[Value]) -> Option<Value> {
        if let (Scalar::Cast(to), [x]) = (scalar, args) {
            return (self.dtype(x) == to).then(|| x.clone());
        }
        let [a, b] = args else { return None };
        let (neutral, either) = match scalar {
            Scalar::Mul => (1.0, true),
            Scalar::Div => (1.0, false),
            Scalar::And => (1.0, true),
            Scalar::Or => (0.0, true),
            _ => return None,
        };
        let is_neutral = |value: &Value, x: &Value| {
            let Value::Known(known) = value else { return false };
            let shape = self.shape(x);
            let lead = shape.len().checked_sub(known.shape.len());
            let fits = lead.is_some_and(|lead| {
                known
                    .shape
                    .iter()
                    .zip(&shape[lead..])
                    .all(|(&own, other)| own == 1 || Dim::from(own) == *other)
            });
            fits && known.dtype == self.dtype(x) && known.all_equal(neutral)
        };
        if is_neutral(b, a) {
            return Some(a.clone());
        }
        (either && is_neutral(a, b)).then(|| b.clone())
    }

    /// Sums of index grids and products with a size.
    fn affine_function(&mut self, scalar: Scalar, args: &[Value]) -> Lowered<Option<Affine>> {
        let is_affine = |value: &Value| matches!(value, Value::Affine(_));
        match (scalar, args) {
            (Scalar::Cast(to), [Value::Affine(a)]) if matches!(to, DType::I64 | DType::I32) => {
                Ok(Some(Affine { dtype: to, ..(**a).clone() }))
            }
            (Scalar::Neg, [Value::Affine(a)]) => Ok(Some(scaled(a, &Dim::constant(-1)))),
            (Scalar::Mul, [a, b]) if is_affine(a) || is_affine(b) => {
                let (affine, factor) = match (a, b) {
                    (Value::Affine(a), Value::Known(k)) | (Value::Known(k), Value::Affine(a)) => {
                        (a.clone(), k.clone())
                    }
                    _ => return Ok(None),
                };
                let Some(Element::Int(factor_dim)) = factor.single() else { return Ok(None) };
                let shape = self.broadcast_shapes(&[affine.shape.clone(), factor.dims()])?;
                Ok(scaled(&affine, factor_dim).broadcast(&shape))
            }
            (Scalar::Add | Scalar::Sub, [a, b]) if is_affine(a) || is_affine(b) => {
                let (Some(a), Some(b)) = (as_affine(a), as_affine(b)) else { return Ok(None) };
                let shape = self.broadcast_shapes(&[a.shape.clone(), b.shape.clone()])?;
                let refresh = |side: &Affine| Affine {
                    dtype: side.dtype,
                    shape: self.current_all(&side.shape),
                    offset: self.current(&side.offset),
                    strides: self.current_all(&side.strides),
                };
                let b = if scalar == Scalar::Sub { scaled(&b, &Dim::constant(-1)) } else { b };
                let (Some(a), Some(b)) = (refresh(&a).broadcast(&shape), refresh(&b).broadcast(&shape))
                else {
                    return Ok(None);
                };
                let strides = a.strides.iter().zip(&b.strides).map(|(x, y)| x + y).collect();
                Ok(Some(Affine { dtype: a.dtype, shape, offset: &a.offset + &b.offset, strides }))
            }
            _ => Ok(None),
        }
    }

    /// Computes the elements if all operands are known and every element of the result is.
    fn fold_function(&mut self, scalar: Scalar, args: &[Value]) -> Lowered<Option<Known>> {
        let any_open = args.iter().any(|arg| matches!(arg, Value::Known(known) if known.is_open()));
        let foldable = |value: &Value| match value {
            Value::Known(_) | Value::Affine(_) => true,
            Value::Weight(_) => any_open,
            Value::Data(_) | Value::Grid(_) | Value::Poison => false,
        };
        if !args.iter().all(foldable) {
            return Ok(None);
        }
        let Some(knowns) = args.iter().map(|arg| self.known(arg)).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let shapes: Vec<Vec<Dim>> = knowns.iter().map(|known| known.dims()).collect();
        let shape = self.broadcast_shapes(&shapes)?;
        let Some(shape) = shape.iter().map(Dim::as_size).collect::<Option<Vec<usize>>>() else {
            return Ok(None);
        };
        let Some(count) = tpshard_ir::tensor::element_count(&shape) else { return Ok(None) };
        if !self.may_fold(count) {
            return Ok(None);
        }
        let types: Vec<DType> = knowns.iter().map(|known| known.dtype).collect();
        let Some(dtype) = result_type(scalar, &types)? else { return Ok(None) };
        let maps: Vec<Vec<usize>> = knowns.iter().map(|known| broadcast_map(&known.shape, &shape)).collect();
        let mut elements = Vec::with_capacity(count);
        for at in 0..count {
            let operands: Option<Vec<&Element>> =
                knowns.iter().zip(&maps).map(|(known, map)| known.elements.get(*map.get(at)?)).collect();
            let element = operands.and_then(|operands| compute(scalar, &types, dtype, &operands));
            match element {
                Some(element) => elements.push(element),
                None => return Ok(None),
            }
        }
        Ok(Some(Known::new(dtype, shape, elements)))
    }
}

fn as_affine(value: &Value) -> Option<Affine> {
    match value {
        Value::Affine(affine) => Some((**affine).clone()),
        Value::Known(known) => match known.single()? {
            Element::Int(dim) if known.dtype.is_integer() => Some(Affine {
                dtype: known.dtype,
                shape: known.dims(),
                offset: dim.clone(),
                strides: vec![Dim::constant(0); known.shape.len()],
            }),
            _ => None,
        },
        _ => None,
    }
}

fn scaled(affine: &Affine, factor: &Dim) -> Affine {
    Affine {
        offset: &affine.offset * factor,
        strides: affine.strides.iter().map(|stride| stride * factor).collect(),
        ..affine.clone()
    }
}

/// For each element of `to`, the element of `from` that broadcasting puts there.
pub(crate) fn broadcast_map(from: &[usize], to: &[usize]) -> Vec<usize> {
    let lead = to.len().saturating_sub(from.len());
    let strides = strides_of(from);
    let count: usize = to.iter().product();
    (0..count)
        .map(|flat| {
            let index = unflatten(flat, to);
            (0..from.len())
                .map(|axis| if from[axis] == 1 { 0 } else { index[lead + axis] * strides[axis] })
                .sum()
        })
        .collect()
}

/// The element type of the result; `None` for what is not folded.
fn result_type(scalar: Scalar, types: &[DType]) -> Lowered<Option<DType>> {
    use Scalar as S;
    let Some(&first) = types.first() else { return Ok(None) };
    let operands = if scalar == S::Select { types.get(1..).unwrap_or(&[]) } else { types };
    if operands.windows(2).any(|pair| pair[0] != pair[1]) {
        let names: Vec<&str> = types.iter().map(|dtype| dtype.name()).collect();
        return Err(invalid(format!("operands are of types {}", names.join(", "))));
    }
    Ok(Some(match scalar {
        S::Cast(to) => to,
        S::Equal | S::Less | S::LessEqual | S::Greater | S::GreaterEqual | S::IsNan | S::IsInf => DType::Bool,
        S::Select => operands.first().copied().unwrap_or(first),
        _ => first,
    }))
}

/// One element of the result; `None` if it depends on sizes in a way that has no form.
fn compute(scalar: Scalar, types: &[DType], dtype: DType, operands: &[&Element]) -> Option<Element> {
    match (scalar, operands) {
        (Scalar::Cast(_), [x]) => cast_element(x, *types.first()?, dtype),
        (Scalar::Select, [condition, a, b]) => {
            Some(if condition.integer()? != 0 { (*a).clone() } else { (*b).clone() })
        }
        (_, operands) => {
            if let Some(dims) = sizes(operands)
                && let Some(element) = integer_function(scalar, types.first()?.class(), &dims)
            {
                let inside = element.integer().is_none_or(|value| dtype.is_float() || fits(dtype, value));
                return inside.then_some(element);
            }
            let numbers: Option<Vec<f64>> = operands.iter().map(|element| element.number()).collect();
            float_function(scalar, *types.first()?, dtype, &numbers?)
        }
    }
}

/// The operands as sizes, if they are; next to one that is not known before the run, whole floats are some as well.
fn sizes<'e>(operands: &[&'e Element]) -> Option<Vec<Cow<'e, Dim>>> {
    let any_open = operands.iter().any(|element| element.is_open());
    let size = |element: &&'e Element| match element {
        Element::Int(dim) => Some(Cow::Borrowed(dim)),
        // Inside ±2^53 floats are exact.
        Element::Float(value) if any_open && value.fract() == 0.0 && value.abs() <= 9.0e15 => {
            Some(Cow::Owned(Dim::constant(*value as i64)))
        }
        Element::Float(_) => None,
    };
    operands.iter().map(size).collect()
}

/// Conversion of one element.
pub(crate) fn cast_element(element: &Element, from: DType, to: DType) -> Option<Element> {
    match (element, to.class()) {
        (Element::Int(dim), DTypeClass::Float) => {
            round_to(to, 0.0)?;
            match dim.as_const() {
                Some(value) => Some(Element::Float(round_to(to, value as f64)?)),
                None => Some(Element::Int(dim.clone())),
            }
        }
        (Element::Int(dim), DTypeClass::Bool) => Some(Element::int(i64::from(dim.as_const()? != 0))),
        (Element::Int(dim), _) => match dim.as_const() {
            Some(value) => fits(to, value).then(|| Element::int(value)),
            None => Some(Element::Int(dim.clone())),
        },
        (Element::Float(value), DTypeClass::Float) => {
            Some(Element::Float(round_to(to, round_to(from, *value)?)?))
        }
        (Element::Float(value), DTypeClass::Bool) => Some(Element::int(i64::from(*value != 0.0))),
        (Element::Float(value), _) => {
            let whole = value.trunc();
            // Inside ±2^53 the conversion is exact and no wrapping rule matters.
            let small = whole.abs() <= 9.0e15;
            (small && fits(to, whole as i64)).then(|| Element::int(whole as i64))
        }
    }
}

/// Functions of integers, which may be sizes.
fn integer_function(scalar: Scalar, class: DTypeClass, dims: &[Cow<'_, Dim>]) -> Option<Element> {
    let dims: Vec<&Dim> = dims.iter().map(AsRef::as_ref).collect();
    use Scalar as S;
    let truth = |value: bool| Some(Element::int(i64::from(value)));
    let dim = |dim: Dim| Some(Element::Int(dim));
    match (scalar, dims.as_slice()) {
        (S::Neg, [x]) => dim(-*x),
        (S::Abs, [x]) if x.is_nonnegative() => dim((*x).clone()),
        (S::Abs, [x]) => dim(Dim::constant(x.as_const()?.checked_abs()?)),
        (S::Sign, [x]) => Some(Element::int(x.as_const()?.signum())),
        (S::Not, [x]) => truth(x.as_const()? == 0),
        (S::Floor | S::Ceil | S::Round, [x]) => dim((*x).clone()),
        (S::IsNan | S::IsInf, [_]) => truth(false),
        (S::Add, [a, b]) => checked(a, b, i64::checked_add).or_else(|| symbolic(a, b, *a + *b)),
        (S::Sub, [a, b]) => checked(a, b, i64::checked_sub).or_else(|| symbolic(a, b, *a - *b)),
        (S::Mul, [a, b]) => checked(a, b, i64::checked_mul).or_else(|| symbolic(a, b, *a * *b)),
        (S::Div, [a, b]) => divide(class, a, b),
        (S::Mod, [a, b]) => match (a.as_const(), b.as_const()) {
            (Some(a), Some(b)) => {
                let rest = a.checked_rem(b)?;
                Some(Element::int(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }))
            }
            (_, Some(b_value)) if b_value > 0 => dim(a.modulo(b)),
            _ => None,
        },
        (S::Rem, [a, b]) => checked(a, b, i64::checked_rem),
        (S::Pow, [a, b]) if class != DTypeClass::Float => {
            Some(Element::int(a.as_const()?.checked_pow(u32::try_from(b.as_const()?).ok()?)?))
        }
        (S::Min, [a, b]) => dim(a.minimum(b)),
        (S::Max, [a, b]) => dim(a.maximum(b)),
        (S::And, [a, b]) => truth(a.as_const()? != 0 && b.as_const()? != 0),
        (S::Or, [a, b]) => truth(a.as_const()? != 0 || b.as_const()? != 0),
        (S::Xor, [a, b]) => truth((a.as_const()? != 0) != (b.as_const()? != 0)),
        (S::Equal, [a, b]) if a == b => truth(true),
        (S::Equal, [a, b]) => never_equal(a, b).then(|| Element::int(0)),
        (S::Less, [a, b]) => truth(less(a, b)?),
        (S::Greater, [a, b]) => truth(less(b, a)?),
        (S::LessEqual, [a, b]) => truth(!less(b, a)?),
        (S::GreaterEqual, [a, b]) => truth(!less(a, b)?),
        (S::BitAnd, [a, b]) => Some(Element::int(a.as_const()? & b.as_const()?)),
        (S::BitOr, [a, b]) => Some(Element::int(a.as_const()? | b.as_const()?)),
        (S::BitXor, [a, b]) => Some(Element::int(a.as_const()? ^ b.as_const()?)),
        _ => None,
    }
}

fn checked(a: &Dim, b: &Dim, function: fn(i64, i64) -> Option<i64>) -> Option<Element> {
    function(a.as_const()?, b.as_const()?).map(Element::int)
}

/// Arithmetic with a symbol in it; two constants that overflow have no form.
fn symbolic(a: &Dim, b: &Dim, result: Dim) -> Option<Element> {
    (a.as_const().is_none() || b.as_const().is_none()).then_some(Element::Int(result))
}

/// `a < b`, where it holds or fails for all sizes.
fn less(a: &Dim, b: &Dim) -> Option<bool> {
    if (b - a - Dim::constant(1)).is_nonnegative() {
        return Some(true);
    }
    (a - b).is_nonnegative().then_some(false)
}

fn divide(class: DTypeClass, a: &Dim, b: &Dim) -> Option<Element> {
    if let (Some(a), Some(b)) = (a.as_const(), b.as_const()) {
        if class == DTypeClass::Float {
            return (b != 0 && a % b == 0).then(|| Element::int(a / b));
        }
        return a.checked_div(b).map(Element::int);
    }
    if let Some(exact) = a.exact_div(b) {
        return Some(Element::Int(exact));
    }
    // Truncation is flooring where nothing is negative.
    let floors = class != DTypeClass::Float && a.is_nonnegative() && b.is_nonnegative() && !b.is_zero();
    floors.then(|| Element::Int(a.floor_div(b)))
}

/// Functions of constants that are not integers.
fn float_function(scalar: Scalar, from: DType, to: DType, x: &[f64]) -> Option<Element> {
    use Scalar as S;
    if !from.is_float() {
        return None;
    }
    let truth = |value: bool| Some(Element::int(i64::from(value)));
    if x.iter().any(|x| x.is_nan()) && matches!(scalar, S::Min | S::Max) {
        return Some(Element::Float(f64::NAN));
    }
    let value = match (scalar, x) {
        (S::Neg, [x]) => -x,
        (S::Abs, [x]) => x.abs(),
        (S::Sign, [x]) => match x.partial_cmp(&0.0)? {
            Ordering::Less => -1.0,
            Ordering::Equal => 0.0,
            Ordering::Greater => 1.0,
        },
        (S::Reciprocal, [x]) => 1.0 / x,
        (S::Sqrt, [x]) => x.sqrt(),
        (S::Rsqrt, [x]) => 1.0 / x.sqrt(),
        (S::Exp, [x]) => x.exp(),
        (S::Log, [x]) => x.ln(),
        (S::Sin, [x]) => x.sin(),
        (S::Cos, [x]) => x.cos(),
        (S::Tanh, [x]) => x.tanh(),
        (S::Floor, [x]) => x.floor(),
        (S::Ceil, [x]) => x.ceil(),
        (S::Round, [x]) => x.round_ties_even(),
        (S::Add, [a, b]) => a + b,
        (S::Sub, [a, b]) => a - b,
        (S::Mul, [a, b]) => a * b,
        (S::Div, [a, b]) => a / b,
        (S::Pow, [a, b]) => a.powf(*b),
        (S::Min, [a, b]) => a.min(*b),
        (S::Max, [a, b]) => a.max(*b),
        (S::IsNan, [x]) => return truth(x.is_nan()),
        (S::IsInf, [x]) => return truth(x.is_infinite()),
        (S::Equal, [a, b]) => return truth(a == b),
        (S::Less, [a, b]) => return truth(a < b),
        (S::LessEqual, [a, b]) => return truth(a <= b),
        (S::Greater, [a, b]) => return truth(a > b),
        (S::GreaterEqual, [a, b]) => return truth(a >= b),
        _ => return None,
    };
    Some(Element::Float(round_to(to, value)?))
}
