//! Requests of different lengths that join and leave the steps of one session: each is answered bit for bit as if it
//! were alone.

use crate::support::*;
use std::collections::BTreeMap;
use std::path::Path;
use tpshard_ir::program::RankProgram;
use tpshard_ir::{Data, Tensor};
use tpshard_runtime::comm::{CommOptions, threads};
use tpshard_runtime::cpu::FileWeights;
use tpshard_runtime::elf::read_section;
use tpshard_runtime::io::SafeTensorsFile;
use tpshard_runtime::session::{Session, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

const VOCABULARY: usize = 512;

/// A prompt that comes at some step and is continued for some more.
struct Request {
    arrives: usize,
    prompt: Vec<i64>,
    tokens: usize,
}

/// Eight of them, mostly of different lengths when they step together; the fifth and
/// the first are as long as each other while both are there.
fn requests() -> Vec<Request> {
    let plan = [(0, 3, 9), (0, 7, 4), (0, 1, 12), (2, 6, 5), (3, 6, 5), (5, 1, 6), (6, 13, 5), (8, 17, 2)];
    let request = |(id, (arrives, length, tokens)): (usize, (usize, usize, usize))| Request {
        arrives,
        prompt: (0..length).map(|i| ((31 * id + 17 * i + 5) % VOCABULARY) as i64).collect(),
        tokens,
    };
    plan.into_iter().enumerate().map(request).collect()
}

/// All ranks of a folder on threads; `body` is rank 0.
fn with_session<T: Send>(
    folder: &Path,
    ranks: usize,
    slots: usize,
    body: impl Fn(&mut Session) -> T + Sync,
) -> T {
    let ends = threads(ranks, &CommOptions::default()).unwrap();
    let options = SessionOptions {
        threads: Some(1),
        state: Some(StateOptions { capacity: 20, slots }),
        ..SessionOptions::default()
    };
    let results: Vec<Option<T>> = std::thread::scope(|scope| {
        let start = |(rank, end)| {
            let (options, body) = (&options, &body);
            scope.spawn(move || {
                let payload = read_section(&folder.join(format!("rank{rank}"))).unwrap().unwrap();
                let program = RankProgram::decode(&payload).unwrap();
                let file = SafeTensorsFile::open(&folder.join(format!("rank{rank}.safetensors"))).unwrap();
                let mut session = Session::open(program, &mut FileWeights::new(file), end, options).unwrap();
                if rank != 0 {
                    session.follow().unwrap();
                    return None;
                }
                let found = body(&mut session);
                session.close().unwrap();
                Some(found)
            })
        };
        let handles: Vec<_> = ends.into_iter().enumerate().map(start).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    results.into_iter().flatten().next().unwrap()
}

/// One step of slots that each get equally many tokens behind what they hold; the logits of the last ones.
fn step(session: &mut Session, slots: &[SlotId], rows: &[Vec<i64>]) -> Vec<Vec<f32>> {
    let past: Vec<usize> = slots.iter().map(|&slot| session.slot_length(slot).unwrap_or(0)).collect();
    let new = rows[0].len();
    let longest = past.iter().max().unwrap() + new;
    let ids =
        |columns: usize, values: Vec<i64>| Tensor::from_vec(vec![slots.len(), columns], values).unwrap();
    let positions = past.iter().flat_map(|&past| past..past + new).map(|p| p as i64).collect();
    let inputs = BTreeMap::from([
        ("input_ids".to_string(), ids(new, rows.concat())),
        ("position_ids".to_string(), ids(new, positions)),
        ("attention_mask".to_string(), ids(longest, vec![1; slots.len() * longest])),
    ]);
    let results = session.run_step(slots, &inputs).unwrap();
    let Data::F32(logits) = results.outputs["logits"].tensor.data() else { panic!("logits are not floats") };
    let last = |row: &[f32]| row[row.len() - VOCABULARY..].to_vec();
    logits.chunks(new * VOCABULARY).map(last).collect()
}

fn greedy(logits: &[f32]) -> i64 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).fold(0, better) as i64
}

/// The logits behind every token of a request, alone in a session.
fn alone(folder: &Path, ranks: usize, request: &Request) -> Vec<Vec<f32>> {
    with_session(folder, ranks, 1, |session| {
        let slot = [SlotId(0)];
        let mut logits = step(session, &slot, std::slice::from_ref(&request.prompt));
        while logits.len() < request.tokens {
            let token = greedy(logits.last().unwrap());
            logits.extend(step(session, &slot, &[vec![token]]));
        }
        logits
    })
}

/// The same of all requests in one session, those that are there stepping together.
fn together(folder: &Path, ranks: usize, requests: &[Request]) -> Vec<Vec<Vec<f32>>> {
    with_session(folder, ranks, 6, |session| {
        let mut found: Vec<Vec<Vec<f32>>> = vec![Vec::new(); requests.len()];
        let (mut most, mut clock) = (0, 0);
        while found.iter().zip(requests).any(|(found, request)| found.len() < request.tokens) {
            // Names of slots that are free again serve for others.
            let slot = |id: usize| SlotId(id as u64 + 100);
            let there: Vec<usize> =
                (0..requests.len()).filter(|&id| session.slot_length(slot(id)).is_some()).collect();
            if !there.is_empty() {
                let slots: Vec<SlotId> = there.iter().map(|&id| slot(id)).collect();
                let rows: Vec<Vec<i64>> =
                    there.iter().map(|&id| vec![greedy(found[id].last().unwrap())]).collect();
                for (&id, logits) in there.iter().zip(step(session, &slots, &rows)) {
                    found[id].push(logits);
                }
            }
            for (id, request) in requests.iter().enumerate().filter(|(_, r)| r.arrives == clock) {
                found[id] = step(session, &[slot(id)], std::slice::from_ref(&request.prompt));
            }
            for (id, request) in requests.iter().enumerate() {
                if found[id].len() == request.tokens && session.slot_length(slot(id)).is_some() {
                    session.drop_slot(slot(id)).unwrap();
                }
            }
            most = most.max(there.len());
            clock += 1;
        }
        assert!(most >= 4, "at most {most} stepped together");
        found
    })
}

#[test]
fn requests_that_join_and_leave_are_answered_as_if_alone() {
    let requests = requests();
    for ranks in [1, 2, 3] {
        let folder = sharded(ranks);
        let found = together(&folder, ranks, &requests);
        for (id, (request, found)) in requests.iter().zip(&found).enumerate() {
            assert_eq!(found.len(), request.tokens);
            let expected = alone(&folder, ranks, request);
            // Bits, not numbers.
            let bits = |all: &[Vec<f32>]| all.concat().iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            assert!(bits(found) == bits(&expected), "request {id} on {ranks} ranks");
        }
    }
}
