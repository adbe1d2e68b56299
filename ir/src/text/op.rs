//! Operations with their attributes, printing and parsing side by side.

use super::scan::{Parsed, Scanner};
use super::{literal, quote};
use crate::deferred::DeferredCall;
use crate::dim::Dim;
use crate::graph::Type;
use crate::layout::Monoid;
use crate::op::{
    Conversion, EinsumSpec, Literal, NormKind, Op, PadMode, PoolKind, Real, Scalar, TableWindow, Window,
};
use std::fmt::Display;
use std::sync::Arc;

/// `key=value, …` in braces.
#[derive(Default)]
struct Attributes(Vec<String>);

impl Attributes {
    fn with(mut self, key: &str, value: impl Display) -> Attributes {
        self.0.push(format!("{key}={value}"));
        self
    }

    fn list<T: Display>(self, key: &str, values: &[T]) -> Attributes {
        let text: Vec<String> = values.iter().map(T::to_string).collect();
        self.with(key, format!("[{}]", text.join(", ")))
    }

    fn window(self, window: &Window) -> Attributes {
        self.list("kernel", &window.kernel)
            .list("strides", &window.strides)
            .list("dilations", &window.dilations)
            .list("pads_low", &window.pads_low)
            .list("pads_high", &window.pads_high)
            .with("ceil", window.ceil)
    }

    fn print(self) -> String {
        format!(" {{{}}}", self.0.join(", "))
    }
}

fn attributes() -> Attributes {
    Attributes::default()
}

/// Shortest decimal; NaNs in hexadecimal bits.
fn real(value: Real) -> String {
    if value.0.is_nan() { format!("{:#x}", value.0.to_bits()) } else { format!("{:?}", value.0) }
}

fn monoid_or_none(monoid: Option<Monoid>) -> &'static str {
    monoid.map_or("none", Monoid::name)
}

/// Everything between the `=` of a node and its operands.
pub(super) fn print(op: &Op) -> String {
    let details = match op {
        Op::Input { name } => format!(" {}", quote(name)),
        Op::Weight(expr) => format!(" {expr}"),
        Op::Literal(value) => format!(" {}", literal::print(&value.0)),
        Op::Size(dim) => attributes().with("value", dim).print(),
        Op::Iota { start, length } => attributes().with("start", start).with("length", length).print(),
        Op::Map(Scalar::Cast(to)) => attributes().with("to", to).print(),
        Op::Map(Scalar::Bits(to)) => attributes().with("to", to).print(),
        Op::Map(_) => String::new(),
        Op::Einsum(spec) => format!(" {}", quote(&spec.to_string())),
        Op::Reduce { monoid, axes } => attributes().with("monoid", monoid).list("axes", axes).print(),
        Op::Scan { monoid, axis, exclusive, reverse } => attributes()
            .with("monoid", monoid)
            .with("axis", axis)
            .with("exclusive", exclusive)
            .with("reverse", reverse)
            .print(),
        Op::Conv { window, groups } => attributes().window(window).with("groups", groups).print(),
        Op::Pool { kind, window } => {
            let kind = match kind {
                PoolKind::Max => "max".into(),
                PoolKind::Average { count_padding: false } => "average".into(),
                PoolKind::Average { count_padding: true } => "average_padded".into(),
                PoolKind::Lp { p } => format!("lp({p})"),
            };
            attributes().with("kind", kind).window(window).print()
        }
        Op::TopK { axis, k, largest } => {
            attributes().with("axis", axis).with("k", k).with("largest", largest).print()
        }
        Op::Broadcast { shape } | Op::Reshape { shape } => attributes().list("shape", shape).print(),
        Op::Transpose { perm } => attributes().list("perm", perm).print(),
        Op::Slice { axis, start, length, step } => attributes()
            .with("axis", axis)
            .with("start", start)
            .with("length", length)
            .with("step", step)
            .print(),
        Op::Pad { low, high, mode } => {
            let mode = match mode {
                PadMode::Constant(value) => format!("constant({})", real(*value)),
                PadMode::Reflect => "reflect".into(),
                PadMode::Edge => "edge".into(),
                PadMode::Wrap => "wrap".into(),
            };
            attributes().list("low", low).list("high", high).with("mode", mode).print()
        }
        Op::Gather { axis, window: Some(window) } => attributes()
            .with("axis", axis)
            .with("start", &window.start)
            .with("extent", &window.extent)
            .print(),
        Op::Concat { axis }
        | Op::Gather { axis, window: None }
        | Op::GatherElements { axis }
        | Op::Append { axis }
        | Op::Softmax { axis } => attributes().with("axis", axis).print(),
        Op::GatherNd { batch_dims } => attributes().with("batch_dims", batch_dims).print(),
        Op::ScatterElements { axis, monoid } => {
            attributes().with("axis", axis).with("monoid", monoid_or_none(*monoid)).print()
        }
        Op::ScatterNd { monoid } => attributes().with("monoid", monoid_or_none(*monoid)).print(),
        Op::Dequant { axis, block } => attributes().with("axis", axis).with("block", block).print(),
        Op::Norm { kind, axis, epsilon } => {
            let kind = match kind {
                NormKind::Layer => "layer",
                NormKind::Rms => "rms",
            };
            attributes().with("kind", kind).with("axis", axis).with("epsilon", real(*epsilon)).print()
        }
        Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } => attributes()
            .with("scale", real(*scale))
            .with("softcap", softcap.map_or("none".into(), real))
            .list("kv_of_head", kv_of_head)
            .with("empty_rows_zero", empty_rows_zero)
            .print(),
        Op::Rotary { interleaved } => attributes().with("interleaved", interleaved).print(),
        Op::Deferred { call, output, ty } => {
            let attributes =
                attributes().with("output", output).with("dtype", ty.dtype).list("shape", &ty.shape);
            format!(" {} {}{}", quote(&call.name), quote(&call.code_text()), attributes.print())
        }
        Op::Convert(conversion) => return print_conversion(conversion),
    };
    format!("{}{details}", op.name())
}

pub(super) fn print_conversion(conversion: &Conversion) -> String {
    let start = attributes().list("axes", conversion.axes());
    let all = match conversion {
        Conversion::ShardSlice { dim, unit, .. } | Conversion::AllGather { dim, unit, .. } => {
            start.with("dim", dim).with("unit", unit)
        }
        Conversion::OnlyFirst { monoid, .. } | Conversion::AllReduce { monoid, .. } => {
            start.with("monoid", monoid)
        }
        Conversion::AllToAll { from, from_unit, to, to_unit, .. } => {
            start.with("from", from).with("from_unit", from_unit).with("to", to).with("to_unit", to_unit)
        }
        Conversion::ReduceScatter { monoid, dim, unit, .. } => {
            start.with("monoid", monoid).with("dim", dim).with("unit", unit)
        }
        Conversion::Redeal { dim, from_unit, to_unit, .. } => {
            start.with("dim", dim).with("from_unit", from_unit).with("to_unit", to_unit)
        }
        Conversion::Transfer => return conversion.name().into(),
        Conversion::TreeReduce { axis, unit, .. } => start.with("axis", axis).with("unit", unit),
    };
    format!("{}{}", conversion.name(), all.print())
}

/// Reads `{key=value, …}` in a fixed order; dropped without [`Keys::end`] only on errors.
struct Keys<'s, 'a> {
    scanner: &'s mut Scanner<'a>,
    first: bool,
}

impl<'a> Keys<'_, 'a> {
    fn key(&mut self, name: &str) -> Parsed<&mut Scanner<'a>> {
        self.scanner.need(if self.first { "{" } else { "," })?;
        self.first = false;
        self.scanner.need_word(name)?;
        self.scanner.need("=")?;
        Ok(self.scanner)
    }

    fn size(&mut self, name: &str) -> Parsed<usize> {
        self.key(name)?.number()
    }

    fn sizes(&mut self, name: &str) -> Parsed<Vec<usize>> {
        self.key(name)?.list("[", "]", Scanner::number)
    }

    fn dim(&mut self, name: &str) -> Parsed<Dim> {
        self.key(name)?.dim()
    }

    fn dims(&mut self, name: &str) -> Parsed<Vec<Dim>> {
        self.key(name)?.dims()
    }

    fn boolean(&mut self, name: &str) -> Parsed<bool> {
        self.key(name)?.boolean()
    }

    fn real(&mut self, name: &str) -> Parsed<Real> {
        self.key(name)?.real().map(Real)
    }

    fn monoid(&mut self, name: &str) -> Parsed<Monoid> {
        self.key(name)?.monoid()
    }

    fn monoid_or_none(&mut self, name: &str) -> Parsed<Option<Monoid>> {
        let scanner = self.key(name)?;
        if scanner.eat_word("none") { Ok(None) } else { scanner.monoid().map(Some) }
    }

    fn window(&mut self) -> Parsed<Window> {
        Ok(Window {
            kernel: self.sizes("kernel")?,
            strides: self.sizes("strides")?,
            dilations: self.sizes("dilations")?,
            pads_low: self.sizes("pads_low")?,
            pads_high: self.sizes("pads_high")?,
            ceil: self.boolean("ceil")?,
        })
    }

    fn end<T>(self, value: T) -> Parsed<T> {
        self.scanner.need("}")?;
        Ok(value)
    }
}

impl<'a> Scanner<'a> {
    pub(super) fn monoid(&mut self) -> Parsed<Monoid> {
        let word = self.peek_word();
        match Monoid::ALL.into_iter().find(|m| m.name() == word) {
            Some(monoid) => self.need_word(word).map(|()| monoid),
            None => Err(self.expected("`sum`, `prod`, `max` or `min`")),
        }
    }

    /// What [`print`] wrote.
    pub(super) fn op(&mut self) -> Parsed<Op> {
        let start = self.place();
        let name = self.word("an operation")?;
        match name {
            "input" => return Ok(Op::Input { name: self.string()?.into() }),
            "weight" => return Ok(Op::Weight(self.weight()?)),
            "literal" => return Ok(Op::Literal(Literal(Arc::new(self.literal()?)))),
            "deferred" => return self.deferred(),
            "einsum" => {
                let at = self.place();
                let text = self.string()?;
                return EinsumSpec::parse(&text)
                    .map(Op::Einsum)
                    .ok_or_else(|| self.error_at(at, "expected index letters such as \"bsk,kn->bsn\""));
            }
            _ => {}
        }
        if let Some(&scalar) = Scalar::ALL.iter().find(|s| s.name() == name) {
            return Ok(Op::Map(scalar));
        }
        let mut keys = Keys { scanner: self, first: true };
        if let Some(op) = computation(name, &mut keys)? {
            return keys.end(op);
        }
        if let Some(conversion) = conversion(name, &mut keys)? {
            let op = Op::Convert(conversion);
            return if keys.first { Ok(op) } else { keys.end(op) };
        }
        Err(self.error_at(start, format!("expected an operation, found `{name}`")))
    }

    fn deferred(&mut self) -> Parsed<Op> {
        let name = self.string()?;
        let at = self.place();
        let code = self.string()?;
        let call = DeferredCall::parse(&name, &code)
            .ok_or_else(|| self.error_at(at, "expected bytes in hexadecimal"))?;
        let mut keys = Keys { scanner: self, first: true };
        let output = keys.size("output")?;
        let ty = Type::new(keys.key("dtype")?.dtype()?, keys.dims("shape")?);
        keys.end(Op::Deferred { call: Arc::new(call), output, ty })
    }

    /// What [`print_conversion`] wrote.
    pub(super) fn conversion(&mut self) -> Parsed<Conversion> {
        let start = self.place();
        let name = self.word("`compute` or a conversion")?;
        let mut keys = Keys { scanner: self, first: true };
        match conversion(name, &mut keys)? {
            Some(conversion) if keys.first => Ok(conversion),
            Some(conversion) => keys.end(conversion),
            None => Err(self.error_at(start, format!("expected `compute` or a conversion, found `{name}`"))),
        }
    }
}

fn computation(name: &str, keys: &mut Keys<'_, '_>) -> Parsed<Option<Op>> {
    Ok(Some(match name {
        "size" => Op::Size(keys.dim("value")?),
        "iota" => Op::Iota { start: keys.dim("start")?, length: keys.dim("length")? },
        "cast" => Op::Map(Scalar::Cast(keys.key("to")?.dtype()?)),
        "bits" => Op::Map(Scalar::Bits(keys.key("to")?.dtype()?)),
        "reduce" => Op::Reduce { monoid: keys.monoid("monoid")?, axes: keys.sizes("axes")? },
        "scan" => Op::Scan {
            monoid: keys.monoid("monoid")?,
            axis: keys.size("axis")?,
            exclusive: keys.boolean("exclusive")?,
            reverse: keys.boolean("reverse")?,
        },
        "conv" => Op::Conv { window: keys.window()?, groups: keys.size("groups")? },
        "pool" => Op::Pool { kind: pool_kind(keys.key("kind")?)?, window: keys.window()? },
        "top_k" => {
            Op::TopK { axis: keys.size("axis")?, k: keys.dim("k")?, largest: keys.boolean("largest")? }
        }
        "broadcast" => Op::Broadcast { shape: keys.dims("shape")? },
        "reshape" => Op::Reshape { shape: keys.dims("shape")? },
        "transpose" => Op::Transpose { perm: keys.sizes("perm")? },
        "slice" => Op::Slice {
            axis: keys.size("axis")?,
            start: keys.dim("start")?,
            length: keys.dim("length")?,
            step: keys.key("step")?.signed()?,
        },
        "pad" => {
            Op::Pad { low: keys.dims("low")?, high: keys.dims("high")?, mode: pad_mode(keys.key("mode")?)? }
        }
        "concat" => Op::Concat { axis: keys.size("axis")? },
        "gather" => {
            let axis = keys.size("axis")?;
            let whole = keys.scanner.peek("}");
            let window = if whole {
                None
            } else {
                Some(TableWindow { start: keys.dim("start")?, extent: keys.dim("extent")? })
            };
            Op::Gather { axis, window }
        }
        "gather_elements" => Op::GatherElements { axis: keys.size("axis")? },
        "gather_nd" => Op::GatherNd { batch_dims: keys.size("batch_dims")? },
        "scatter_elements" => {
            Op::ScatterElements { axis: keys.size("axis")?, monoid: keys.monoid_or_none("monoid")? }
        }
        "scatter_nd" => Op::ScatterNd { monoid: keys.monoid_or_none("monoid")? },
        "dequant" => Op::Dequant { axis: keys.size("axis")?, block: keys.size("block")? },
        "append" => Op::Append { axis: keys.size("axis")? },
        "softmax" => Op::Softmax { axis: keys.size("axis")? },
        "norm" => Op::Norm {
            kind: norm_kind(keys.key("kind")?)?,
            axis: keys.size("axis")?,
            epsilon: keys.real("epsilon")?,
        },
        "attention" => Op::Attention {
            scale: keys.real("scale")?,
            softcap: {
                let scanner = keys.key("softcap")?;
                if scanner.eat_word("none") { None } else { Some(Real(scanner.real()?)) }
            },
            kv_of_head: keys.key("kv_of_head")?.list("[", "]", Scanner::number)?,
            empty_rows_zero: keys.boolean("empty_rows_zero")?,
        },
        "rotary" => Op::Rotary { interleaved: keys.boolean("interleaved")? },
        _ => return Ok(None),
    }))
}

fn conversion(name: &str, keys: &mut Keys<'_, '_>) -> Parsed<Option<Conversion>> {
    const NAMES: [&str; 8] = [
        "shard_slice",
        "only_first",
        "all_gather",
        "all_to_all",
        "all_reduce",
        "reduce_scatter",
        "redeal",
        "tree_reduce",
    ];
    if !NAMES.contains(&name) {
        return Ok((name == Conversion::Transfer.name()).then_some(Conversion::Transfer));
    }
    let axes = keys.sizes("axes")?;
    Ok(Some(match name {
        "shard_slice" => Conversion::ShardSlice { axes, dim: keys.size("dim")?, unit: keys.dim("unit")? },
        "only_first" => Conversion::OnlyFirst { axes, monoid: keys.monoid("monoid")? },
        "all_gather" => Conversion::AllGather { axes, dim: keys.size("dim")?, unit: keys.dim("unit")? },
        "all_to_all" => Conversion::AllToAll {
            axes,
            from: keys.size("from")?,
            from_unit: keys.dim("from_unit")?,
            to: keys.size("to")?,
            to_unit: keys.dim("to_unit")?,
        },
        "all_reduce" => Conversion::AllReduce { axes, monoid: keys.monoid("monoid")? },
        "reduce_scatter" => Conversion::ReduceScatter {
            axes,
            monoid: keys.monoid("monoid")?,
            dim: keys.size("dim")?,
            unit: keys.dim("unit")?,
        },
        "redeal" => Conversion::Redeal {
            axes,
            dim: keys.size("dim")?,
            from_unit: keys.dim("from_unit")?,
            to_unit: keys.dim("to_unit")?,
        },
        _ => Conversion::TreeReduce { axes, axis: keys.size("axis")?, unit: keys.dim("unit")? },
    }))
}

fn pool_kind(scanner: &mut Scanner<'_>) -> Parsed<PoolKind> {
    if scanner.eat_word("max") {
        return Ok(PoolKind::Max);
    }
    if scanner.eat_word("average") {
        return Ok(PoolKind::Average { count_padding: false });
    }
    if scanner.eat_word("average_padded") {
        return Ok(PoolKind::Average { count_padding: true });
    }
    if !scanner.eat_word("lp") {
        return Err(scanner.expected("`max`, `average`, `average_padded` or `lp(p)`"));
    }
    scanner.need("(")?;
    let p = scanner.number()?;
    scanner.need(")")?;
    Ok(PoolKind::Lp { p })
}

fn pad_mode(scanner: &mut Scanner<'_>) -> Parsed<PadMode> {
    for (name, mode) in [("reflect", PadMode::Reflect), ("edge", PadMode::Edge), ("wrap", PadMode::Wrap)] {
        if scanner.eat_word(name) {
            return Ok(mode);
        }
    }
    if !scanner.eat_word("constant") {
        return Err(scanner.expected("`constant(x)`, `reflect`, `edge` or `wrap`"));
    }
    scanner.need("(")?;
    let value = Real(scanner.real()?);
    scanner.need(")")?;
    Ok(PadMode::Constant(value))
}

fn norm_kind(scanner: &mut Scanner<'_>) -> Parsed<NormKind> {
    if scanner.eat_word("layer") {
        return Ok(NormKind::Layer);
    }
    if scanner.eat_word("rms") { Ok(NormKind::Rms) } else { Err(scanner.expected("`layer` or `rms`")) }
}
