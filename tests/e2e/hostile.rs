//! A certificate is a file that anybody may have written: whatever its text says, reading it, verifying it, checking it
//! and instantiating it end in errors, never in a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use tpshard_ir::program::{Entry, RankProgram, graph_part};
use tpshard_ir::text::{parse_graph, parse_program, print_program};
use tpshard_ir::{Graph, Spmd, container};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{MemoryGoal, PlanOptions};

const CASES: u64 = 600;

/// Every operation whose attributes depend on the rank, and those that name axes.
const MODEL: &str = r#"graph "small"
symbol b 1..4
symbol s 1..64
state "past" -> "present" axis 2
%0 = input "ids" : i64[b, s] @ "ids"
%1 = weight init("table", f32, [16, 8]) : f32[16, 8] @ "table"
%2 = gather {axis=0} (%1, %0) : f32[b, s, 8] @ "embed"
%3 = weight init("q", f32, [8, 8]) : f32[8, 8]
%4 = einsum "bsk,kn->bsn" (%2, %3) : f32[b, s, 8] @ "q"
%5 = reshape {shape=[b, s, 4, 2]} (%4) : f32[b, s, 4, 2] @ "split"
%6 = transpose {perm=[0, 2, 1, 3]} (%5) : f32[b, 4, s, 2] @ "heads"
%7 = input "past" : f32[b, 4, 5, 2]
%8 = append {axis=2} (%7, %6) : f32[b, 4, s + 5, 2] @ "append"
%9 = attention {scale=0.5, softcap=none, kv_of_head=[0, 1, 2, 3], empty_rows_zero=false} (%6, %8, %8) : f32[b, 4, s, 2] @ "attention"
%10 = softmax {axis=3} (%9) : f32[b, 4, s, 2] @ "softmax"
%11 = literal f32[4, 1, 1] [1.0, 2.0, 3.0, 4.0] : f32[4, 1, 1]
%12 = mul (%10, %11) : f32[b, 4, s, 2] @ "scale"
%13 = slice {axis=3, start=0, length=1, step=1} (%12) : f32[b, 4, s, 1] @ "slice"
%14 = concat {axis=3} (%12, %13) : f32[b, 4, s, 3] @ "concat"
%15 = pad {low=[0, 0, 0, 0], high=[0, 0, 0, 1], mode=constant(0.0)} (%14) : f32[b, 4, s, 4] @ "pad"
%16 = weight init("kernel", f32, [4, 1, 1, 2]) : f32[4, 1, 1, 2]
%17 = conv {kernel=[1, 2], strides=[1, 1], dilations=[1, 1], pads_low=[0, 0], pads_high=[0, 0], ceil=false, groups=4} (%15, %16) : f32[b, 4, s, 3] @ "conv"
%18 = reduce {monoid=sum, axes=[1]} (%17) : f32[b, 1, s, 3] @ "reduce"
%19 = top_k {axis=3, k=1, largest=true} (%18) : i64[b, 1, s, 1] @ "best"
%20 = gather_elements {axis=3} (%18, %19) : f32[b, 1, s, 1] @ "pick"
%21 = iota {start=3, length=4} : i64[4]
%22 = cast {to=f32} (%21) : f32[4] @ "cast"
%23 = broadcast {shape=[b, 1, s, 4]} (%20) : f32[b, 1, s, 4] @ "broadcast"
%24 = mul (%23, %22) : f32[b, 1, s, 4] @ "weigh"
%25 = literal f32[4] [1.0, 1.0, 1.0, 1.0] : f32[4]
%26 = norm {kind=rms, axis=3, epsilon=1e-05} (%24, %25) : f32[b, 1, s, 4] @ "norm"
output "y" %26
output "present" %8
"#;

fn planned(ranks: usize) -> (Graph, Spmd) {
    let model = tpshard_ir::verify::verify(parse_graph(MODEL).unwrap()).unwrap().into_inner();
    let mut options = PlanOptions::new(ranks, Profile::built_in("h100-sxm").unwrap());
    options.memory = MemoryGoal::Least;
    let bindings = [("b".into(), 1), ("s".into(), 16)].into();
    options.entries = vec![tpshard_passes::Entry::new("main", bindings)];
    let mut extended = Extended::new(model.clone());
    tpshard_passes::canonical::canonicalise(&mut extended);
    let plan = tpshard_passes::plan(extended, &options).unwrap();
    let (_, program) = plan.programs.into_iter().next().unwrap();
    tpshard_checker::check(&program, &model).unwrap();
    (model, program)
}

/// SplitMix64: the same mutations everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}

const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "2",
    "3",
    "7",
    "64",
    "1024",
    "65536",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "-9223372036854775808",
];

/// Words, numbers and single marks.
fn tokens(line: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    for c in line.chars() {
        let plain = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        match tokens.last_mut() {
            Some(last) if plain(c) && last.chars().all(plain) => last.push(c),
            _ => tokens.push(c.into()),
        }
    }
    tokens
}

/// Changes one line or one token of it.
fn mutate(text: &str, random: &mut Random) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let (at, other) = (random.below(lines.len()), random.below(lines.len()));
    let mut parts = tokens(&lines[at]);
    let numbers: Vec<usize> =
        (0..parts.len()).filter(|&i| parts[i].starts_with(|c: char| c.is_ascii_digit())).collect();
    let number = numbers.get(random.below(numbers.len())).copied();
    match (random.below(10), number) {
        (0, _) => lines.swap(at, other),
        (1, _) => drop(lines.remove(at)),
        (2, _) => {
            let mut cut = lines.join("\n");
            cut.truncate((0..=random.below(cut.len())).rev().find(|&i| cut.is_char_boundary(i)).unwrap_or(0));
            return cut;
        }
        (3, _) => {
            // The operands of another line.
            let tail = |line: &str| line.find(" (").map(|i| line[i..].to_owned());
            if let (Some(own), Some(theirs)) = (tail(&lines[at]), tail(&lines[other])) {
                lines[at] = lines[at].replace(&own, &theirs);
            }
        }
        (4, _) => {
            // An attribute, or an operand, is dropped.
            let from = random.below(parts.len());
            let to = (from + 1..parts.len()).find(|&i| [",", ")", "}", "]"].contains(&parts[i].as_str()));
            lines[at] =
                [&parts[..from], &parts[to.map_or(from + 1, |t| t + 1).min(parts.len())..]].concat().concat();
        }
        (5, _) => {
            let from = tokens(&lines[other]);
            let token = random.below(parts.len());
            parts[token] = from[random.below(from.len())].clone();
            lines[at] = parts.concat();
        }
        (_, Some(number)) => {
            let new = random.below(NUMBERS.len() + 2);
            parts[number] = NUMBERS.get(new).map_or_else(|| other.to_string(), |n| (*n).to_owned());
            lines[at] = parts.concat();
        }
        (_, None) => drop(lines.remove(at)),
    }
    lines.join("\n")
}

/// How far a text came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    Text,
    Program,
    Verified,
    Checked,
}

fn read(text: &str, model: &Graph) -> Reached {
    let Ok(program) = parse_program(text) else { return Reached::Text };
    // Nobody verified it: errors all the same.
    let ranks = program.mesh.0.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis)).unwrap_or(usize::MAX);
    let ranks = ranks.min(4);
    let graphs: Vec<Graph> =
        (0..ranks).filter_map(|rank| tpshard_ir::spmd::instantiate(&program, rank).ok()).collect();
    let _ = tpshard_ir::spmd::instantiate(&program, usize::MAX);
    let entries = [("main".to_owned(), program)];
    for rank in 0..ranks {
        let _ = Entry::from_spmd(&entries[0].1, rank, "main");
        let _ = tpshard_codegen::build::planned_shards(&entries, rank);
        let _ = tpshard_codegen::build::entry(&entries[0].1, rank, "main");
    }
    let [(_, program)] = entries;
    let checked = tpshard_checker::check(&program, model).is_ok();
    let _ = tpshard_checker::check_ranks(&program, &graphs);
    match (tpshard_ir::verify::verify_program(program), checked) {
        (Err(_), _) => Reached::Program,
        (Ok(_), false) => Reached::Verified,
        (Ok(_), true) => Reached::Checked,
    }
}

#[test]
fn no_certificate_makes_a_reader_panic() {
    let mut reached = Vec::new();
    for ranks in [1, 3] {
        let (model, program) = planned(ranks);
        let text = print_program(&program);
        assert_eq!(read(&text, &model), Reached::Checked);
        let mut random = Random(ranks as u64);
        for case in 0..CASES {
            let mut changed = mutate(&text, &mut random);
            if case % 3 == 0 {
                changed = mutate(&changed, &mut random);
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| read(&changed, &model)));
            reached.push(outcome.unwrap_or_else(|_| panic!("{ranks} ranks, case {case}\n{changed}")));
        }
    }
    // The mutations go deep enough to mean something.
    for stage in [Reached::Text, Reached::Program, Reached::Verified] {
        let count = reached.iter().filter(|r| **r == stage).count();
        assert!(count > CASES as usize / 20, "{count} texts came as far as {stage:?}");
    }
}

/// The same for what a rank's executable holds: only the graph is changed, so that everything else fits.
#[test]
fn no_rank_program_makes_its_reader_panic() {
    let (_, program) = planned(3);
    let (mut refused, mut accepted) = (0, 0);
    let mut random = Random(5);
    for case in 0..CASES {
        let rank = (case % 3) as usize;
        let mut parts = RankProgram::from_spmd(&program, rank).unwrap().to_parts();
        let at = if case % 2 == 0 {
            parts.iter().position(|(name, _)| *name == graph_part(0)).unwrap()
        } else {
            random.below(parts.len())
        };
        parts[at].1 = mutate(std::str::from_utf8(&parts[at].1).unwrap(), &mut random).into_bytes();
        let list: Vec<(&str, &[u8])> =
            parts.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        let bytes = container::encode(&list).unwrap();
        let outcome = catch_unwind(AssertUnwindSafe(|| RankProgram::decode(&bytes).is_ok()));
        match outcome.unwrap_or_else(|_| panic!("case {case}: {}", parts[at].0)) {
            true => accepted += 1,
            false => refused += 1,
        }
    }
    assert!(refused > accepted && accepted > 0, "{refused} refused, {accepted} accepted");
}
