//! Products of few rows: reading the right operand once is all the work there is.
//!
//! Where it lies along the depth, a warp sums a column; where it lies along the columns, a thread sums several neighbouring
//! ones over a part of the depth, and the parts are added. Both read 16 bytes at a time where memory is aligned for it.
//! Whatever lies in another way is read element by element.

use super::{FEW, Groups, LEFT, Quantised, RESULT, RIGHT, Right, SCALE, THREADS, Task, ZERO, at, place};
use crate::cuda::emit::Emitter;
use crate::cuda::text::{Call, load, store, wide_type};
use tpshard_ir::program::device::{Launch, Parameter};
use tpshard_ir::{DType, Dim};

/// Blocks that are enough for a card.
const ENOUGH_BLOCKS: i64 = 512;
/// Least steps along the depth of one part.
const LEAST_PART: i64 = 64;
const MOST_PARTS: i64 = 32;

/// `when` is 1 or 0: whether there is anything to do.
pub(super) fn narrow(emitter: &mut Emitter<'_>, task: &Task, when: &Dim) -> Vec<Launch> {
    let stride = |group, operand| Groups::step(group, operand).is_some_and(|s| s.is_one());
    let Groups { batch, columns, depth, .. } = &task.groups;
    let along_depth = stride(depth, LEFT) && stride(depth, RIGHT);
    let single = matches!(task.dtype, DType::F32 | DType::F16 | DType::BF16);
    match &task.right {
        Right::Plain(_) if along_depth && single => {
            vec![by_columns(emitter, task, when, Some(16 * 8 / task.dtype.bits()))]
        }
        Right::Quantised(q) if along_depth && q.in_eights() => vec![by_columns(emitter, task, when, Some(8))],
        Right::Plain(_) if batch.extents.is_empty() && stride(columns, RIGHT) && single => {
            by_parts(emitter, task, when)
        }
        _ => vec![by_columns(emitter, task, when, None)],
    }
}

impl Quantised {
    /// True if eight elements along the depth always share a scale and fill whole bytes.
    fn in_eights(&self) -> bool {
        self.along_depth && self.block.is_multiple_of(8) && matches!(self.q.dtype.bits(), 4 | 8)
    }
}

/// A warp for each column, which walks the depth; all rows of a column are summed in one pass. With `wide`, so many
/// neighbouring elements are read at once.
fn by_columns(emitter: &mut Emitter<'_>, task: &Task, when: &Dim, wide: Option<usize>) -> Launch {
    let Task { value, dtype, groups, .. } = task;
    let (real, batches) = (wide_type(*dtype), groups.batch.count());
    let mut call = Call::new();
    task.arrays(&mut call);
    call.write("y", *dtype, *value, &Dim::constant(0));
    let (columns, depth) = (call.variable(&groups.columns.count()), call.variable(&groups.depth.count()));
    let rows = call.variable(&groups.rows.count());
    call.lines(
        "unsigned lanes = blockDim.x < 32 ? 1 : 32;
        unsigned lane = threadIdx.x % lanes, warps = blockDim.x / lanes;",
    );
    let batch_count = call.variable(&batches);
    call.line(format!("for (i64 batch = blockIdx.y; batch < {batch_count}; batch += gridDim.y) {{"));
    task.batch_places(&mut call);
    // The loop's bounds are the same for all lanes of a warp.
    call.line(format!(
        "for (i64 column = blockIdx.x * (i64)warps + threadIdx.x / lanes; column < {columns}; \
         column += gridDim.x * (i64)warps) {{"
    ));
    let column_places = call.places(&groups.columns, "column");
    call.line(format!("{real} sums[{FEW}] = {{}};"));
    call.line("i64 done = 0;");
    if let Some(wide) = wide {
        wide_steps(&mut call, task, &column_places, wide, [&depth, &rows]);
    }
    call.line(format!("for (i64 k = done + lane; k < {depth}; k += lanes) {{"));
    let depth_places = call.places(&groups.depth, "k");
    let element = task.right_element(&mut call, &column_places, &depth_places, ["column", "k"]);
    call.line(format!("{real} w = {element};"));
    for_rows(&mut call, &rows, |call| {
        let row_places = call.places(&groups.rows, "m");
        let from = at("left_batch", &[place(&row_places, LEFT), place(&depth_places, LEFT)]);
        call.line(format!("sums[m] += {} * w;", load(*dtype, "left", &from)));
    });
    call.line("}");
    call.line("UNROLL");
    call.line(format!("for (int m = 0; m < {FEW}; m++) {{"));
    call.line(format!("{real} sum = warp_reduce(sums[m], Add());"));
    call.line(format!("if (lane == 0 && m < {rows}) {{"));
    let row_places = call.places(&groups.rows, "m");
    let to = at("y_batch", &[place(&row_places, RESULT), place(&column_places, RESULT)]);
    call.line(store("y", &to, "sum"));
    call.lines("}\n}\n}\n}");
    let blocks = groups.columns.count().ceil_div(&Dim::constant(i64::from(THREADS / 32))) * when;
    let blocks = [blocks, batches.minimum(&Dim::constant(65535)), Dim::constant(1)];
    call.finish(emitter.kernels, &format!("product_narrow_{}", task.suffix()), THREADS, blocks, 0)
}

/// A loop over the rows, with `m` the row.
fn for_rows(call: &mut Call, rows: &str, body: impl FnOnce(&mut Call)) {
    call.line("UNROLL");
    call.line(format!("for (int m = 0; m < {FEW}; m++) {{"));
    call.line(format!("if (m < {rows}) {{"));
    body(call);
    call.line("}");
    call.line("}");
}

/// Steps of `wide` elements along the depth, where a column and all rows begin at aligned places; `done` says how far that
/// went.
fn wide_steps(call: &mut Call, task: &Task, columns: &[String], wide: usize, [depth, rows]: [&str; 2]) {
    let Task { dtype, groups, right, .. } = task;
    let stored = right.stored().dtype;
    let row_step = Groups::step(&groups.rows, LEFT).unwrap_or_else(|| Dim::constant(0));
    let row_step = call.size(&row_step);
    let first = at("right_batch", &[place(columns, RIGHT)]);
    call.line(format!("i64 first = {first};"));
    // Four bits an element: places are counted in elements, memory in bytes.
    let (array, bytes) = match stored.bits() {
        4 => ("right + first / 2", wide / 2),
        bits => ("right + first", wide * bits / 8),
    };
    let left_bytes = (wide * dtype.bits() / 8).min(16);
    call.line(format!(
        "bool aligned = first % {wide} == 0 && (u64)({array}) % {bytes} == 0 && \
         (u64)(left + left_batch) % {left_bytes} == 0 && {row_step} % {wide} == 0;"
    ));
    call.line("if (aligned) {");
    call.line(format!("done = {depth} / {wide} * {wide};"));
    call.line(format!("for (i64 k = lane * {wide}; k < done; k += lanes * {wide}) {{"));
    let left_type = crate::cuda::text::c_type(*dtype).unwrap_or("float");
    let left_pack = format!("Pack<{left_type}, {wide}, {left_bytes}>");
    match right {
        Right::Plain(_) => {
            call.line(format!("{left_pack} w = *reinterpret_cast<const {left_pack} *>({array} + k);"));
        }
        Right::Quantised(quantised) => unpack(call, quantised, columns, array, &groups.depth),
    }
    for_rows(call, rows, |call| {
        call.line(format!(
            "{left_pack} x = *reinterpret_cast<const {left_pack} *>(left + left_batch + m * {row_step} + k);"
        ));
        let (element, factor) = match right {
            Right::Plain(_) => ("wide(w.e[j])", ""),
            Right::Quantised(_) => ("w[j]", " * factor"),
        };
        call.line("float part = 0;");
        call.line("UNROLL");
        call.line(format!("for (int j = 0; j < {wide}; j++) part += wide(x.e[j]) * {element};"));
        call.line(format!("sums[m] += part{factor};"));
    });
    call.line("}");
    call.line("}");
}

/// Declares `w`, eight numbers without their zero, and `factor`, their scale.
fn unpack(
    call: &mut Call,
    quantised: &Quantised,
    columns: &[String],
    array: &str,
    depth: &crate::cuda::space::Offsets,
) {
    let block = call.variable(&Dim::from(quantised.block));
    let depth_places = call.places(depth, "k");
    let [scale_step, zero_step] = quantised.steps.each_ref().map(|step| call.size(step));
    let place_of = |base: &str, operand: usize, step: &str| {
        at(base, &[place(columns, operand), place(&depth_places, operand), &format!("k / {block} * {step}")])
    };
    let factor = load(quantised.scale.dtype, "scale", &place_of("scale_batch", SCALE, &scale_step));
    call.line(format!("float factor = {factor};"));
    let zero = match &quantised.zero {
        Some(zero) => {
            format!("(float){}", load(zero.dtype, "zero", &place_of("zero_batch", ZERO, &zero_step)))
        }
        None => "0.0f".into(),
    };
    call.line(format!("float centre = {zero};"));
    call.line("float w[8];");
    match quantised.q.dtype {
        DType::U4 | DType::I4 => {
            call.line(format!("unsigned bits = *reinterpret_cast<const unsigned *>({array} + k / 2);"));
            let signed = if quantised.q.dtype == DType::I4 { " ^ 8) - 8" } else { ")" };
            call.line("UNROLL");
            call.line(format!(
                "for (int j = 0; j < 8; j++) w[j] = (float)((int)((bits >> 4 * j) & 15{signed}) - centre;"
            ));
        }
        dtype => {
            let ty = crate::cuda::text::c_type(dtype).unwrap_or("unsigned char");
            call.line(format!(
                "Pack<{ty}, 8, 8> bytes = *reinterpret_cast<const Pack<{ty}, 8, 8> *>({array} + k);"
            ));
            call.line("UNROLL");
            call.line("for (int j = 0; j < 8; j++) w[j] = (float)bytes.e[j] - centre;");
        }
    }
}

/// Threads of neighbouring columns, warps of parts of the depth; where a card needs more blocks than there are columns, parts
/// are dealt out to blocks too, and a second call adds their sums, in order.
fn by_parts(emitter: &mut Emitter<'_>, task: &Task, when: &Dim) -> Vec<Launch> {
    let Task { value, dtype, groups, .. } = task;
    let wide = 16 * 8 / dtype.bits();
    let (rows, columns) = (groups.rows.count(), groups.columns.count());
    let chunks = columns.ceil_div(&Dim::from(32 * wide));
    let parts = parts(&chunks, &groups.depth.count());
    let mut call = Call::new();
    task.arrays(&mut call);
    if parts > 1 {
        call.scratch("sums", Parameter::Write(DType::F32), Dim::constant(0));
    } else {
        call.write("y", *dtype, *value, &Dim::constant(0));
    }
    let (column_count, depth) = (call.variable(&columns), call.variable(&groups.depth.count()));
    let row_count = call.variable(&rows);
    call.line(format!("SHARED(float, partial, 8 * 32 * {wide});"));
    call.lines(&format!(
        "unsigned lanes = blockDim.x < 32 ? 1 : 32;
        unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, warps = blockDim.x / lanes;
        for (i64 base = blockIdx.x * (i64)lanes * {wide}; base < {column_count}; base += gridDim.x * (i64)lanes * {wide}) {{
        i64 column = base + lane * {wide};
        float sums_of[{FEW}][{wide}] = {{}};
        for (i64 k = blockIdx.y * warps + warp; k < {depth}; k += gridDim.y * warps) {{
        float w[{wide}] = {{}};"
    ));
    weights(&mut call, task, wide, &column_count);
    let depth_places = call.places(&groups.depth, "k");
    for_rows(&mut call, &row_count, |call| {
        let row_places = call.places(&groups.rows, "m");
        let from = at("0", &[place(&row_places, LEFT), place(&depth_places, LEFT)]);
        call.line(format!("float x = {};", load(*dtype, "left", &from)));
        call.line("UNROLL");
        call.line(format!("for (int j = 0; j < {wide}; j++) sums_of[m][j] += x * w[j];"));
    });
    call.line("}");
    call.line("UNROLL");
    call.lines(&format!(
        "for (int m = 0; m < {FEW}; m++) {{
        if (m < {row_count}) {{
        __syncthreads();
        UNROLL
        for (int j = 0; j < {wide}; j++) partial[(warp * lanes + lane) * {wide} + j] = sums_of[m][j];
        __syncthreads();
        for (i64 c = threadIdx.x; c < lanes * {wide} && base + c < {column_count}; c += blockDim.x) {{
        float sum = 0;
        for (unsigned other = 0; other < warps; other++) sum += partial[other * lanes * {wide} + c];
        i64 o = base + c;"
    ));
    if parts > 1 {
        call.line(format!("sums[(blockIdx.y * {row_count} + m) * {column_count} + o] = sum;"));
    } else {
        let (row_places, column_places) = (call.places(&groups.rows, "m"), call.places(&groups.columns, "o"));
        let to = at("0", &[place(&row_places, RESULT), place(&column_places, RESULT)]);
        call.line(store("y", &to, "sum"));
    }
    call.lines("}\n}\n}\n}");
    let blocks = [chunks * when, Dim::constant(parts), Dim::constant(1)];
    let family = format!("product_parts_{dtype}");
    let mut calls = vec![call.finish(emitter.kernels, &family, THREADS, blocks, 0)];
    if parts > 1 {
        calls.push(added(emitter, task, parts, when));
        let few = rows.minimum(&Dim::constant(FEW));
        emitter.need_scratch(few * &columns * Dim::constant(parts * 4) * when);
    }
    calls
}

/// How many parts the depth is cut into.
fn parts(chunks: &Dim, depth: &Dim) -> i64 {
    let wanted = chunks.as_const().map_or(4, |chunks| ENOUGH_BLOCKS / chunks.max(1));
    let room = depth.as_const().map_or(MOST_PARTS, |depth| depth / LEAST_PART);
    wanted.min(room).clamp(1, MOST_PARTS)
}

/// Loads the right operand's elements at `k` and the columns from `column` on.
fn weights(call: &mut Call, task: &Task, wide: usize, column_count: &str) {
    let depth_places = call.places(&task.groups.depth, "k");
    let row = place(&depth_places, RIGHT).to_string();
    let ty = crate::cuda::text::c_type(task.dtype).unwrap_or("float");
    call.lines(&format!(
        "const {ty} *from = right + ({row} + column);
        if (column + {wide} <= {column_count} && (u64)from % 16 == 0) {{
        Pack<{ty}, {wide}, 16> pack = *reinterpret_cast<const Pack<{ty}, {wide}, 16> *>(from);
        UNROLL
        for (int j = 0; j < {wide}; j++) w[j] = wide(pack.e[j]);
        }} else {{
        UNROLL
        for (int j = 0; j < {wide}; j++) if (column + j < {column_count}) w[j] = wide(from[j]);
        }}"
    ));
}

/// Adds the sums of all parts.
fn added(emitter: &mut Emitter<'_>, task: &Task, parts: i64, when: &Dim) -> Launch {
    let Task { value, dtype, groups, .. } = task;
    let (rows, columns) = (groups.rows.count(), groups.columns.count());
    let mut call = Call::new();
    call.scratch("sums", Parameter::Read(DType::F32), Dim::constant(0));
    call.write("y", *dtype, *value, &Dim::constant(0));
    let (row_count, column_count) = (call.variable(&rows), call.variable(&columns));
    let parts = call.variable(&Dim::constant(parts));
    let count = &rows * &columns;
    call.for_each("i", &count);
    call.lines(&format!(
        "i64 m = i;
        i64 o = split(m, {column_count});
        float sum = 0;
        for (i64 part = 0; part < {parts}; part++) sum += sums[(part * {row_count} + m) * {column_count} + o];"
    ));
    let (row_places, column_places) = (call.places(&groups.rows, "m"), call.places(&groups.columns, "o"));
    let to = at("0", &[place(&row_places, RESULT), place(&column_places, RESULT)]);
    call.line(store("y", &to, "sum"));
    call.line("}");
    let blocks =
        count.minimum(&(Dim::constant(FEW) * &columns)).ceil_div(&Dim::constant(i64::from(THREADS))) * when;
    call.finish(
        emitter.kernels,
        &format!("add_parts_{dtype}"),
        THREADS,
        [blocks, Dim::constant(1), Dim::constant(1)],
        0,
    )
}
