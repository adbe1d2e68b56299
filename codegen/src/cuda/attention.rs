//! Attention and rotary embeddings.
//!
//! A block takes eight query rows of one head and streams the keys through in pieces: the scores of a piece, the new
//! maximum of every row, what was summed so far scaled down by how much the maximum grew, and the values of the piece added
//! in. Scores are never in memory, and queries, keys and values are read where they lie.

use super::emit::{Emitter, Made, Operand};
use super::space::Offsets;
use super::text::{Call, load, store};
use super::views::dense;
use tpshard_ir::program::device::MAX_SHARED;
use tpshard_ir::{DType, Dim, Node, Op, ValueId};

/// Query rows of a block.
const QUERIES: usize = 8;
/// Keys of a piece.
const KEYS: usize = 128;
const THREADS: u32 = 128;

fn is_single(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// `base + coordinates · strides`.
fn at(call: &mut Call, coordinates: &[&str], strides: &[Dim]) -> String {
    let coordinates: Vec<String> = coordinates.iter().map(|c| c.to_string()).collect();
    call.sum(&coordinates, strides)
}

/// The KV head of head `h`, as an expression.
fn kv_head(call: &mut Call, kv_of_head: &[u32]) -> String {
    let heads = kv_of_head.len();
    let fits = |repeat: usize, first: usize| {
        kv_of_head.iter().enumerate().all(|(h, &kv)| (h + first) / repeat == kv as usize)
    };
    let found = (1..=heads).flat_map(|repeat| (0..repeat).map(move |first| (repeat, first)));
    match found.into_iter().find(|&(repeat, first)| fits(repeat, first)) {
        Some((repeat, first)) => {
            let (repeat, first) = (call.variable(&Dim::from(repeat)), call.variable(&Dim::from(first)));
            format!("(h + {first}) / {repeat}")
        }
        None => {
            let list: Vec<String> = kv_of_head.iter().map(u32::to_string).collect();
            call.line(format!("const int kv_of_head[] = {{{}}};", list.join(", ")));
            "kv_of_head[h]".into()
        }
    }
}

pub(super) fn attention(emitter: &mut Emitter<'_>, value: ValueId, node: &Node) -> Made {
    let Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } = &node.op else { return Made::Not };
    let operands: Vec<Operand> = node.args.iter().map(|&arg| emitter.operand(arg)).collect();
    let [q, k, v, bias @ ..] = operands.as_slice() else { return Made::Not };
    let bias = bias.first();
    let ([batch, heads, queries, depth], [_, _, keys, _], [.., width]) =
        (q.shape.as_slice(), k.shape.as_slice(), v.shape.as_slice())
    else {
        return Made::Not;
    };
    let (Some(depth), Some(width)) = (depth.as_size(), width.as_size()) else { return Made::Not };
    // Queries, sums and scores, and three numbers for every row.
    let floats = QUERIES.saturating_mul(depth.saturating_add(width).saturating_add(KEYS + 3));
    let Ok(shared) = u32::try_from(floats.saturating_mul(4)) else { return Made::Not };
    if !operands.iter().all(|o| is_single(o.dtype)) || shared > MAX_SHARED {
        return Made::Not;
    }
    let mut call = Call::new();
    let mut arrays = Vec::new();
    for (operand, name) in operands.iter().zip(["q", "k", "v", "bias"]) {
        arrays.push(call.read(name, operand.dtype, operand.view.base, &operand.view.offset));
    }
    let out = call.write("y", q.dtype, value, &Dim::constant(0));
    let scale = call.real(scale.0 as f32);
    let softcap = softcap.as_ref().map(|cap| call.real(cap.0 as f32));
    let tiles = queries.ceil_div(&Dim::from(QUERIES));
    let blocks = batch * heads * &tiles;
    let (query_count, key_count) = (call.variable(queries), call.variable(keys));
    let (tile_count, head_count) = (call.variable(&tiles), call.variable(heads));
    call.lines(&format!(
        "DYNAMIC_SHARED(float, queries);
        float *sums = queries + {QUERIES} * {depth};
        float *scores = sums + {QUERIES} * {width};
        float *top = scores + {QUERIES} * {KEYS};
        float *total = top + {QUERIES};
        float *factor = total + {QUERIES};
        unsigned lanes = blockDim.x < 32 ? 1 : 32;
        unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, warps = blockDim.x / lanes;"
    ));
    let kv_head = kv_head(&mut call, kv_of_head);
    call.for_each_row("block", &blocks);
    call.lines(&format!(
        "i64 b = block;
        i64 first = split(b, {tile_count}) * {QUERIES};
        i64 h = split(b, {head_count});
        i64 g = {kv_head};
        i64 count = minimum((i64){QUERIES}, {query_count} - first);
        // The block before has been written.
        __syncthreads();"
    ));
    // Rows beyond the last are zero.
    let place = at(&mut call, &["b", "h", "(first + row)", "d"], &q.view.strides);
    let element = load(q.dtype, "q", &place);
    call.lines(&format!(
        "for (unsigned e = threadIdx.x; e < {QUERIES} * {depth}; e += blockDim.x) {{
        i64 row = e / {depth}, d = e % {depth};
        queries[e] = row < count ? {element} * {scale} : 0.0f;
        }}
        for (unsigned e = threadIdx.x; e < {QUERIES} * {width}; e += blockDim.x) sums[e] = 0;
        for (unsigned i = threadIdx.x; i < {QUERIES}; i += blockDim.x) {{
        top[i] = -INFINITE;
        total[i] = 0;
        }}
        for (i64 t0 = 0; t0 < {key_count}; t0 += {KEYS}) {{
        i64 keys = minimum((i64){KEYS}, {key_count} - t0);
        __syncthreads();
        for (i64 j = threadIdx.x; j < keys; j += blockDim.x) {{
        i64 t = t0 + j;
        float dots[{QUERIES}] = {{}};"
    ));
    let place = at(&mut call, &["b", "g", "t", "d"], &k.view.strides);
    call.lines(&format!(
        "for (i64 d = 0; d < {depth}; d++) {{
        float x = {};
        UNROLL
        for (int i = 0; i < {QUERIES}; i++) dots[i] += queries[i * {depth} + d] * x;
        }}
        UNROLL
        for (int i = 0; i < {QUERIES}; i++) {{
        if (i < count) {{
        float score = dots[i];",
        load(k.dtype, "k", &place)
    ));
    if let Some(cap) = softcap {
        call.line(format!("score = {cap} * tanhf(score / {cap});"));
    }
    if let Some(bias) = bias {
        let scores = [batch, heads, queries, keys].map(Dim::clone);
        let place = at(&mut call, &["b", "h", "(first + i)", "t"], &bias.strides_over(&scores));
        call.line(format!("score += {};", load(bias.dtype, "bias", &place)));
    }
    call.lines(&format!(
        "scores[i * {KEYS} + j] = score;
        }}
        }}
        }}
        __syncthreads();
        for (i64 i = warp; i < count; i += warps) {{
        float *row = scores + i * {KEYS};
        float best = -INFINITE;
        for (i64 j = lane; j < keys; j += lanes) best = maximum(best, row[j]);
        best = warp_reduce(best, Maximum());
        float before = top[i], now = maximum(before, best);
        // A row without a finite score so far has nothing to scale.
        float base = now == -INFINITE ? 0.0f : now;
        float sum = 0;
        for (i64 j = lane; j < keys; j += lanes) {{
        float share = expf(row[j] - base);
        row[j] = share;
        sum += share;
        }}
        sum = warp_reduce(sum, Add());
        if (lane == 0) {{
        float shrunk = expf(before - base);
        factor[i] = shrunk;
        total[i] = total[i] * shrunk + sum;
        top[i] = now;
        }}
        }}
        __syncthreads();
        for (i64 e = threadIdx.x; e < {width}; e += blockDim.x) {{
        float all[{QUERIES}];
        UNROLL
        for (int i = 0; i < {QUERIES}; i++) all[i] = i < count ? sums[i * {width} + e] * factor[i] : 0.0f;
        for (i64 j = 0; j < keys; j++) {{
        i64 t = t0 + j;"
    ));
    let place = at(&mut call, &["b", "g", "t", "e"], &v.view.strides);
    let empty = match empty_rows_zero {
        true => "total[row] == 0",
        false => "false",
    };
    call.lines(&format!(
        "float x = {};
        UNROLL
        for (int i = 0; i < {QUERIES}; i++) if (i < count) all[i] += scores[i * {KEYS} + j] * x;
        }}
        UNROLL
        for (int i = 0; i < {QUERIES}; i++) if (i < count) sums[i * {width} + e] = all[i];
        }}
        }}
        __syncthreads();
        for (i64 f = threadIdx.x; f < count * {width}; f += blockDim.x) {{
        i64 row = f / {width}, e = f % {width};
        float share = {key_count} == 0 || {empty} ? 0.0f : sums[f] / total[row];",
        load(v.dtype, "v", &place)
    ));
    let place = at(&mut call, &["b", "h", "(first + row)", "e"], &dense(&node.ty.shape));
    call.line(store(&out, &place, "share"));
    call.line("}");
    call.line("}");
    let family = format!("attention_{depth}_{width}_{}", q.dtype);
    let blocks = [blocks, Dim::constant(1), Dim::constant(1)];
    Made::Calls(vec![call.finish(emitter.kernels, &family, THREADS, blocks, shared)])
}

/// Pairs `(a, b)` become `(a cos - b sin, a sin + b cos)`.
pub(super) fn rotary(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, interleaved: bool) -> Made {
    let &[x, cos, sin] = node.args.as_slice() else { return Made::Not };
    let [x, cos, sin] = [x, cos, sin].map(|arg| emitter.operand(arg));
    if ![&x, &cos, &sin].iter().all(|o| is_single(o.dtype)) {
        return Made::Not;
    }
    let mut halves = node.ty.shape.clone();
    let Some(last) = halves.last_mut() else { return Made::Not };
    let Some(half) = last.exact_div(&Dim::constant(2)) else { return Made::Not };
    *last = half.clone();
    // Where the first of a pair is, and how far behind it the second.
    let pairs = |strides: &[Dim]| -> (Vec<Dim>, Dim) {
        let mut strides = strides.to_vec();
        let mut distance = Dim::constant(0);
        if let Some(last) = strides.last_mut() {
            distance = if interleaved { last.clone() } else { &*last * &half };
            if interleaved {
                *last = &*last * Dim::constant(2);
            }
        }
        (strides, distance)
    };
    let (of_x, x_distance) = pairs(&x.view.strides);
    let (of_y, y_distance) = pairs(&dense(&node.ty.shape));
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let cos_array = call.read("cosines", cos.dtype, cos.view.base, &cos.view.offset);
    let sin_array = call.read("sines", sin.dtype, sin.view.base, &sin.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let strides = [of_x, cos.strides_over(&halves), sin.strides_over(&halves), of_y];
    let offsets = Offsets::new(&halves, &strides.each_ref().map(Vec::as_slice));
    call.for_each("i", &offsets.count());
    let places = call.places(&offsets, "i");
    let [x_place, cos_place, sin_place, y_place] = places.as_slice() else { return Made::Not };
    let (x_distance, y_distance) = (call.size(&x_distance), call.size(&y_distance));
    call.line(format!("float a = {};", load(x.dtype, &source, x_place)));
    call.line(format!("float b = {};", load(x.dtype, &source, &format!("{x_place} + {x_distance}"))));
    call.line(format!("float c = {};", load(cos.dtype, &cos_array, cos_place)));
    call.line(format!("float s = {};", load(sin.dtype, &sin_array, sin_place)));
    call.line(store(&out, y_place, "a * c - b * s"));
    call.line(store(&out, &format!("{y_place} + {y_distance}"), "a * s + b * c"));
    call.line("}");
    Made::Calls(vec![call.over(emitter.kernels, &format!("rotary_{}", x.dtype), &offsets.count())])
}
