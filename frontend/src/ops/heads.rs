//! What the attention operators of all domains share: heads cut out of hidden dims, masks from index comparisons, the
//! state that keys and values are appended to, and the attention itself.
//!
//! Masks are additive: 0 where a query may look, minus infinity where it may not. Comparisons are made on indices of
//! rank 4, `[batch, head, query, key]`, so that they broadcast against the scores.

use crate::lower::{Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::Real;
use tpshard_ir::{DType, Dim, Op, Scalar, Type, ValueId};

/// How scores become weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scores {
    /// The usual `1/sqrt(head size)` if there is none.
    pub(crate) scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    pub(crate) empty_rows_zero: bool,
}

/// `n` as a head count.
pub(crate) fn head_count(n: i64, what: &str) -> Lowered<usize> {
    usize::try_from(n)
        .ok()
        .filter(|n| (1..=65_536).contains(n))
        .ok_or_else(|| invalid(format!("{what} is {n}, not a number of heads")))
}

/// `attribute > 0` as an option: the operators write "none" as 0.
pub(crate) fn positive(value: f32) -> Option<f64> {
    (value > 0.0).then_some(f64::from(value))
}

/// The dims of a tensor that must have `N` of them.
pub(crate) fn dims_of<const N: usize>(ty: &Type, what: &str) -> Lowered<[Dim; N]> {
    let wrong = |_| invalid(format!("{what} is {ty}, not of rank {N}"));
    <[Dim; N]>::try_from(ty.shape.clone()).map_err(wrong)
}

impl Lowering<'_> {
    /// The type of a value of the graph.
    pub(crate) fn type_of(&self, value: ValueId) -> Type {
        self.graph.ty(value).clone()
    }

    /// `[b, s, h·d]` as `[b, s, h, d]`.
    pub(crate) fn cut_heads(&mut self, value: &Value, heads: usize, what: &str) -> Lowered<Value> {
        let [batch, sequence, hidden] = dims_of(&self.ty(value), what)?;
        let size = hidden.exact_div(&Dim::from(heads));
        let size = size.ok_or_else(|| invalid(format!("{what} has {hidden} entries for {heads} heads")))?;
        self.reshape_value(value, &[batch, sequence, Dim::from(heads), size])
    }

    /// `[b, s, h·d]` as `[b, h, s, d]`; what has rank 4 already has that form.
    pub(crate) fn split_heads(&mut self, value: &Value, heads: usize, what: &str) -> Lowered<ValueId> {
        if self.shape(value).len() == 4 {
            let data = self.data(value)?;
            let found = self.type_of(data);
            self.unify(&found.shape[1], &Dim::from(heads))?;
            return Ok(data);
        }
        let cut = self.cut_heads(value, heads, what)?;
        let turned = self.transpose_value(&cut, &[0, 2, 1, 3])?;
        self.data(&turned)
    }

    /// `[b, h, s, d]` as `[b, s, h·d]`.
    pub(crate) fn join_heads(&mut self, value: ValueId) -> Lowered<ValueId> {
        let turned = self.transpose(value, &[0, 2, 1, 3])?;
        let [batch, sequence, heads, size] = dims_of(&self.type_of(turned), "the result")?;
        self.reshape(turned, &[batch, sequence, heads * size])
    }

    /// Makes the dims of a value those of `shape`, where sizes are not known yet.
    pub(crate) fn unify_shape(&mut self, value: ValueId, shape: &[Dim], what: &str) -> Lowered<()> {
        let rank = self.graph.ty(value).rank();
        if rank != shape.len() {
            return Err(invalid(format!("{what} is of rank {rank}, not {}", shape.len())));
        }
        for (axis, wanted) in shape.iter().enumerate() {
            let found = self.graph.ty(value).shape.get(axis).cloned().unwrap_or_else(|| wanted.clone());
            self.unify(&found, &self.current(wanted))?;
        }
        Ok(())
    }

    /// Makes `value` broadcast to `shape`: its dims are 1 or those.
    pub(crate) fn unify_broadcast(&mut self, value: ValueId, shape: &[Dim], what: &str) -> Lowered<()> {
        let rank = self.graph.ty(value).rank();
        let Some(lead) = shape.len().checked_sub(rank) else {
            return Err(invalid(format!("{what} is of rank {rank}, more than {}", shape.len())));
        };
        for (axis, wanted) in shape.iter().skip(lead).enumerate() {
            let found = self.graph.ty(value).shape.get(axis).cloned().unwrap_or_else(|| wanted.clone());
            if !found.is_one() {
                self.unify(&found, &self.current(wanted))?;
            }
        }
        Ok(())
    }

    /// `past` with `new` appended along `axis`; just `new` without a past.
    pub(crate) fn extend(&mut self, past: Option<&Value>, new: ValueId, axis: usize) -> Lowered<ValueId> {
        let Some(past) = past else { return Ok(new) };
        let past = self.data(past)?;
        let mut shape = self.type_of(new).shape;
        let held = self.type_of(past);
        match (shape.get_mut(axis), held.shape.get(axis)) {
            (Some(dim), Some(length)) => *dim = length.clone(),
            _ => return Err(invalid(format!("the past is {held}"))),
        }
        self.unify_shape(past, &shape, "the past")?;
        self.add(Op::Append { axis }, &[past, new])
    }

    /// `start, start + 1, …` along one axis of a tensor of rank 4.
    pub(crate) fn indices(&mut self, start: Dim, length: Dim, axis: usize) -> Lowered<ValueId> {
        let mut shape = vec![Dim::constant(1); 4];
        if let Some(dim) = shape.get_mut(axis) {
            *dim = length.clone();
        }
        let iota = self.add(Op::Iota { start, length }, &[])?;
        self.reshape(iota, &shape)
    }

    /// One integer per batch as `i64` of shape `[b, 1, 1, 1]`.
    pub(crate) fn per_batch(&mut self, value: &Value, batch: &Dim, what: &str) -> Lowered<ValueId> {
        let data = self.data(value)?;
        let ty = self.type_of(data);
        if !ty.dtype.is_integer() {
            return Err(invalid(format!("{what} is {ty}, not integers")));
        }
        let data = self.reshape(data, &[ty.elements()])?;
        self.unify_shape(data, std::slice::from_ref(batch), what)?;
        let wide = self.cast(data, DType::I64)?;
        let one = Dim::constant(1);
        let batch = self.current(batch);
        self.reshape(wide, &[batch, one.clone(), one.clone(), one])
    }

    /// Both conditions, or the one that there is.
    pub(crate) fn both(&mut self, a: Option<ValueId>, b: ValueId) -> Lowered<ValueId> {
        match a {
            None => Ok(b),
            Some(a) => self.map(Scalar::And, &[a, b]),
        }
    }

    /// 0 where `allowed`, else `otherwise`.
    pub(crate) fn bias_of(&mut self, allowed: ValueId, dtype: DType, otherwise: f64) -> Lowered<ValueId> {
        let (yes, no) = (self.scalar(dtype, 0.0)?, self.scalar(dtype, otherwise)?);
        self.map(Scalar::Select, &[allowed, yes, no])
    }

    /// The sum of two biases, either of which may be absent.
    pub(crate) fn sum_of(&mut self, a: Option<ValueId>, b: Option<ValueId>) -> Lowered<Option<ValueId>> {
        match (a, b) {
            (Some(a), Some(b)) => Ok(Some(self.map(Scalar::Add, &[a, b])?)),
            (one, None) | (None, one) => Ok(one),
        }
    }

    /// Makes the dims of queries, keys and values fit each other.
    pub(crate) fn fit_heads(&mut self, q: ValueId, k: ValueId, v: ValueId) -> Lowered<()> {
        let [batch, _, _, size] = dims_of(&self.type_of(q), "the query")?;
        let [_, kv_heads, total, _] = dims_of(&self.type_of(k), "the key")?;
        let [_, _, _, v_size] = dims_of(&self.type_of(v), "the value")?;
        self.unify_shape(k, &[batch.clone(), kv_heads.clone(), total.clone(), size], "the key")?;
        self.unify_shape(v, &[batch, kv_heads, total, v_size], "the value")
    }

    /// For each query head the KV head it uses.
    pub(crate) fn kv_of_head(&self, q: ValueId, k: ValueId) -> Lowered<Vec<u32>> {
        let count = |value: ValueId| self.graph.ty(value).shape.get(1).and_then(Dim::as_size);
        let (Some(heads), Some(kv_heads)) = (count(q), count(k)) else {
            return Err(unsupported("attention with a number of heads that is not constant"));
        };
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(invalid(format!("{heads} query heads over {kv_heads} key heads")));
        }
        let group = heads / kv_heads;
        let map =
            (0..heads).map(|head| u32::try_from(head / group.max(1)).ok()).collect::<Option<Vec<u32>>>();
        map.ok_or_else(|| invalid(format!("{heads} heads")))
    }

    /// The factor of the scores.
    pub(crate) fn score_scale(&self, q: ValueId, scale: Option<f64>) -> Lowered<f64> {
        if let Some(scale) = scale {
            return Ok(scale);
        }
        let size = self.graph.ty(q).shape.get(3).and_then(Dim::as_size).filter(|&size| size > 0);
        let size = size.ok_or_else(|| unsupported("attention with a head size that is not constant"))?;
        Ok(1.0 / (size as f64).sqrt())
    }

    /// `softmax(cap(scale · q kᵀ) + bias) v` on `[b, h, s, d]`, `[b, g, t, d]`, `[b, g, t, e]`.
    pub(crate) fn attend(
        &mut self,
        [q, k, v]: [ValueId; 3],
        bias: Option<ValueId>,
        scores: Scores,
    ) -> Lowered<ValueId> {
        self.fit_heads(q, k, v)?;
        let kv_of_head = self.kv_of_head(q, k)?;
        let scale = Real(self.score_scale(q, scores.scale)?);
        let mut args = vec![q, k, v];
        if let Some(bias) = bias {
            let [batch, heads, sequence, _] = dims_of(&self.type_of(q), "the query")?;
            let [_, _, total, _] = dims_of(&self.type_of(k), "the key")?;
            self.unify_broadcast(bias, &[batch, heads, sequence, total], "the attention bias")?;
            args.push(self.cast(bias, self.graph.ty(q).dtype)?);
        }
        let softcap = scores.softcap.map(Real);
        let op = Op::Attention { scale, softcap, kv_of_head, empty_rows_zero: scores.empty_rows_zero };
        self.add(op, &args)
    }
}
