//! Attention and rotary embeddings.
//!
//! A block takes eight query rows of one head and streams the keys through in pieces: the scores of a piece, the new
//! maximum of every row, what was summed so far scaled down by how much the maximum grew, and the values of the piece added
//! in. Scores are never in memory, and queries, keys and values are read where they lie. Where there are fewer rows than
//! would fill a card, several blocks share the keys of a row, and a second call joins what they found.

use super::emit::{Emitter, Made, Operand};
use super::space::Offsets;
use super::text::{Call, c_type, load, store};
use super::views::dense;
use tpshard_ir::program::device::{Launch, MAX_SHARED, Parameter};
use tpshard_ir::{DType, Dim, Node, Op, ValueId};

/// Query rows of a block.
const QUERIES: usize = 8;
/// Keys of a piece.
const KEYS: usize = 128;
const THREADS: u32 = 128;
/// Blocks that are enough for a card.
const ENOUGH_BLOCKS: i64 = 256;

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

/// What the kernels of one attention are written from.
struct Task<'a> {
    value: ValueId,
    dtype: DType,
    /// Batch, heads, queries, keys.
    extents: [&'a Dim; 4],
    depth: usize,
    width: usize,
    operands: &'a [Operand],
    kv_of_head: &'a [u32],
    scale: f32,
    softcap: Option<f32>,
    empty_rows_zero: bool,
    /// Blocks that share the keys of a row.
    parts: Dim,
}

pub(super) fn attention(emitter: &mut Emitter<'_>, value: ValueId, node: &Node) -> Made {
    let Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } = &node.op else { return Made::Not };
    let operands: Vec<Operand> = node.args.iter().map(|&arg| emitter.operand(arg)).collect();
    let [q, k, v, ..] = operands.as_slice() else { return Made::Not };
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
    let one = Dim::constant(1);
    let tiles = batch * heads * queries.ceil_div(&Dim::from(QUERIES));
    // As many parts as fill a card, none shorter than two pieces.
    let room = Dim::constant(ENOUGH_BLOCKS).floor_div(&tiles.maximum(&one)).maximum(&one);
    let parts = keys.ceil_div(&Dim::from(2 * KEYS)).maximum(&one).minimum(&room);
    let task = Task {
        value,
        dtype: q.dtype,
        extents: [batch, heads, queries, keys],
        depth,
        width,
        operands: &operands,
        kv_of_head,
        scale: scale.0 as f32,
        softcap: softcap.as_ref().map(|cap| cap.0 as f32),
        empty_rows_zero: *empty_rows_zero,
        parts,
    };
    let mut calls = vec![task.stream(emitter, &tiles, shared)];
    if !task.parts.is_one() {
        let several = (&task.parts - &one).minimum(&one);
        let row = Dim::from(task.width.saturating_add(2).saturating_mul(4));
        emitter.need_scratch(batch * heads * queries * &task.parts * row * &several);
        calls.push(task.join(emitter, &several));
    }
    Made::Calls(calls)
}

impl Task<'_> {
    /// Tiles of query rows against a part of the keys. With one part, that is the result; else each part leaves its maximum,
    /// its total and its sums.
    fn stream(&self, emitter: &mut Emitter<'_>, tiles: &Dim, shared: u32) -> Launch {
        let Task { depth, width, extents: [_, heads, queries, keys], .. } = self;
        let mut call = Call::new();
        for (operand, name) in self.operands.iter().zip(["q", "k", "v", "bias"]) {
            call.read(name, operand.dtype, operand.view.base, &operand.view.offset);
        }
        call.write("y", self.dtype, self.value, &Dim::constant(0));
        if !self.parts.is_one() {
            call.scratch("parts", Parameter::Write(DType::F32), Dim::constant(0));
        }
        let scale = call.real(self.scale);
        let (query_count, key_count) = (call.variable(queries), call.variable(keys));
        let tile_count = call.variable(&queries.ceil_div(&Dim::from(QUERIES)));
        let head_count = call.variable(heads);
        call.lines(&format!(
            "DYNAMIC_SHARED(float, queries);
            float *sums = queries + {QUERIES} * {depth};
            float *scores = sums + {QUERIES} * {width};
            float *top = scores + {QUERIES} * {KEYS};
            float *total = top + {QUERIES};
            float *factor = total + {QUERIES};
            unsigned lanes = blockDim.x < 32 ? 1 : 32;
            unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, warps = blockDim.x / lanes;
            // Whole pieces for every part.
            i64 share = ({key_count} + {KEYS} * gridDim.y - 1) / ({KEYS} * gridDim.y) * {KEYS};
            i64 from = minimum(blockIdx.y * share, {key_count}), to = minimum(from + share, {key_count});"
        ));
        let kv_head = kv_head(&mut call, self.kv_of_head);
        call.for_each_row("block", tiles);
        call.lines(&format!(
            "i64 b = block;
            i64 first = split(b, {tile_count}) * {QUERIES};
            i64 h = split(b, {head_count});
            i64 g = {kv_head};
            i64 count = minimum((i64){QUERIES}, {query_count} - first);
            // The block before has been written.
            __syncthreads();"
        ));
        self.load_queries(&mut call, &scale);
        call.lines(&format!(
            "for (i64 t0 = from; t0 < to; t0 += {KEYS}) {{
            i64 keys = minimum((i64){KEYS}, to - t0);
            __syncthreads();"
        ));
        self.score(&mut call);
        call.line("__syncthreads();");
        soften(&mut call);
        call.line("__syncthreads();");
        self.add_values(&mut call);
        call.line("}");
        call.line("__syncthreads();");
        self.finish(&mut call, [&query_count, &key_count, &head_count]);
        call.line("}");
        let family = format!("attention_{depth}_{width}_{}", self.dtype);
        let blocks = [tiles.clone(), self.parts.clone(), Dim::constant(1)];
        call.finish(emitter.kernels, &family, THREADS, blocks, shared)
    }

    fn operand(&self, index: usize) -> Option<&Operand> {
        self.operands.get(index)
    }

    /// The element of operand `index` at `coordinates`, as an expression.
    fn element(&self, call: &mut Call, index: usize, array: &str, coordinates: &[&str]) -> String {
        let Some(operand) = self.operand(index) else { return String::new() };
        let place = at(call, coordinates, &operand.view.strides);
        load(operand.dtype, array, &place)
    }

    /// The query rows of a block, scaled; rows beyond the last are zero.
    fn load_queries(&self, call: &mut Call, scale: &str) {
        let Task { depth, width, .. } = self;
        let element = self.element(call, 0, "q", &["b", "h", "(first + row)", "d"]);
        call.lines(&format!(
            "for (unsigned e = threadIdx.x; e < {QUERIES} * {depth}; e += blockDim.x) {{
            i64 row = e / {depth}, d = e % {depth};
            queries[e] = row < count ? {element} * {scale} : 0.0f;
            }}
            for (unsigned e = threadIdx.x; e < {QUERIES} * {width}; e += blockDim.x) sums[e] = 0;
            for (unsigned i = threadIdx.x; i < {QUERIES}; i += blockDim.x) {{
            top[i] = -INFINITE;
            total[i] = 0;
            }}"
        ));
    }

    /// A thread scores a key against all rows of the block.
    fn score(&self, call: &mut Call) {
        call.lines(&format!(
            "for (i64 j = threadIdx.x; j < keys; j += blockDim.x) {{
            i64 t = t0 + j;
            float dots[{QUERIES}] = {{}};"
        ));
        self.dots(call);
        call.lines(&format!(
            "UNROLL
            for (int i = 0; i < {QUERIES}; i++) {{
            if (i < count) {{
            float score = dots[i];"
        ));
        if let Some(cap) = self.softcap.map(|cap| call.real(cap)) {
            call.line(format!("score = {cap} * tanhf(score / {cap});"));
        }
        if let Some(bias) = self.operand(3) {
            let scores = self.extents.map(Dim::clone);
            let place = at(call, &["b", "h", "(first + i)", "t"], &bias.strides_over(&scores));
            call.line(format!("score += {};", load(bias.dtype, "bias", &place)));
        }
        call.lines(&format!("scores[i * {KEYS} + j] = score;\n}}\n}}\n}}"));
    }

    /// The products of a key with all rows, 16 bytes of the key at a time where it is aligned for that.
    fn dots(&self, call: &mut Call) {
        let depth = self.depth;
        let Some(k) = self.operand(1) else { return };
        let wide = 16 * 8 / k.dtype.bits();
        let dense = k.view.strides.last().is_some_and(Dim::is_one);
        let add = |x: &str, d: &str| {
            format!(
                "UNROLL\nfor (int i = 0; i < {QUERIES}; i++) dots[i] += queries[i * {depth} + {d}] * {x};"
            )
        };
        let element = self.element(call, 1, "k", &["b", "g", "t", "d"]);
        let plain =
            format!("for (i64 d = 0; d < {depth}; d++) {{\nfloat x = {element};\n{}\n}}", add("x", "d"));
        if !dense || !depth.is_multiple_of(wide) {
            call.lines(&plain);
            return;
        }
        let start = at(call, &["b", "g", "t"], &k.view.strides);
        let ty = c_type(k.dtype).unwrap_or("float");
        call.lines(&format!(
            "const {ty} *key = k + ({start});
            if ((u64)key % 16 == 0) {{
            for (int d = 0; d < {depth}; d += {wide}) {{
            Pack<{ty}, {wide}, 16> pack = *reinterpret_cast<const Pack<{ty}, {wide}, 16> *>(key + d);
            UNROLL
            for (int e = 0; e < {wide}; e++) {{
            float x = wide(pack.e[e]);
            {}
            }}
            }}
            }} else {{
            {plain}
            }}",
            add("x", "d + e")
        ));
    }

    /// A thread adds the values of a piece to one column of the sums.
    fn add_values(&self, call: &mut Call) {
        let width = self.width;
        let element = self.element(call, 2, "v", &["b", "g", "t", "e"]);
        call.lines(&format!(
            "for (i64 e = threadIdx.x; e < {width}; e += blockDim.x) {{
            float all[{QUERIES}];
            UNROLL
            for (int i = 0; i < {QUERIES}; i++) all[i] = i < count ? sums[i * {width} + e] * factor[i] : 0.0f;
            for (i64 j = 0; j < keys; j++) {{
            i64 t = t0 + j;
            float x = {element};
            UNROLL
            for (int i = 0; i < {QUERIES}; i++) if (i < count) all[i] += scores[i * {KEYS} + j] * x;
            }}
            UNROLL
            for (int i = 0; i < {QUERIES}; i++) if (i < count) sums[i * {width} + e] = all[i];
            }}"
        ));
    }

    /// Writes the result, or what this part has of it.
    fn finish(&self, call: &mut Call, [queries, keys, heads]: [&str; 3]) {
        let width = self.width;
        let [batch, head_extent, query_extent, _] = self.extents;
        let shape = [batch.clone(), head_extent.clone(), query_extent.clone(), Dim::from(width)];
        let several = !self.parts.is_one();
        if several {
            call.lines(&format!(
                "if (gridDim.y > 1) {{
                float *own = parts + (((b * {heads} + h) * {queries} + first) * gridDim.y + blockIdx.y) * {0};
                for (i64 i = threadIdx.x; i < count; i += blockDim.x) {{
                own[i * gridDim.y * {0}] = top[i];
                own[i * gridDim.y * {0} + 1] = total[i];
                }}
                for (i64 f = threadIdx.x; f < count * {width}; f += blockDim.x) \
                own[f / {width} * gridDim.y * {0} + 2 + f % {width}] = sums[f];
                }} else {{",
                width + 2
            ));
        }
        let empty = if self.empty_rows_zero { "total[row] == 0" } else { "false" };
        call.lines(&format!(
            "for (i64 f = threadIdx.x; f < count * {width}; f += blockDim.x) {{
            i64 row = f / {width}, e = f % {width};
            float share = {keys} == 0 || {empty} ? 0.0f : sums[f] / total[row];"
        ));
        let place = at(call, &["b", "h", "(first + row)", "e"], &dense(&shape));
        call.line(store("y", &place, "share"));
        call.line("}");
        if several {
            call.line("}");
        }
    }

    /// Joins the parts of every row.
    fn join(&self, emitter: &mut Emitter<'_>, several: &Dim) -> Launch {
        let width = self.width;
        let [batch, heads, queries, _] = self.extents;
        let count = batch * heads * queries * Dim::from(width);
        let mut call = Call::new();
        call.scratch("parts", Parameter::Read(DType::F32), Dim::constant(0));
        call.write("y", self.dtype, self.value, &Dim::constant(0));
        let parts = call.variable(&self.parts);
        call.for_each("i", &count);
        let empty = if self.empty_rows_zero { "total == 0" } else { "false" };
        call.lines(&format!(
            "const float *row = parts + i / {width} * {parts} * {0};
            float top = -INFINITE, total = 0, sum = 0;
            for (i64 p = 0; p < {parts}; p++) top = maximum(top, row[p * {0}]);
            float base = top == -INFINITE ? 0.0f : top;
            for (i64 p = 0; p < {parts}; p++) {{
            float factor = expf(row[p * {0}] - base);
            total += row[p * {0} + 1] * factor;
            sum += row[p * {0} + 2 + i % {width}] * factor;
            }}
            float share = {empty} ? 0.0f : sum / total;",
            width + 2
        ));
        call.line(store("y", "i", "share"));
        call.line("}");
        let blocks = count.ceil_div(&Dim::constant(256)).minimum(&Dim::constant(1 << 16)) * several;
        let blocks = [blocks, Dim::constant(1), Dim::constant(1)];
        call.finish(emitter.kernels, &format!("attention_join_{width}_{}", self.dtype), 256, blocks, 0)
    }
}

/// A warp turns the scores of a row into shares of the maximum so far.
fn soften(call: &mut Call) {
    call.lines(&format!(
        "for (i64 i = warp; i < count; i += warps) {{
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
        }}"
    ));
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
