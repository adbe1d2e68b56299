//! Squares as programs of two kinds of steps, and their execution on random families.

use super::Instance;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::interp::{
    Array, Context, Domain, Field, Interpreter, OpError, Split, decode, encode, eval_op, random_array,
    random_weight,
};
use tpshard_ir::spmd::instantiate;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{
    AxisLayout, Dim, Graph, Layout, Mesh, Monoid, Spmd, SpmdOutput, Step, StepId, StepKind, Type, ValueId,
};
use tpshard_passes::sharding::{Deals, FactorDim, FactorResult, MeshSquare, factors, squares_on_mesh};

const LIMIT: usize = 1 << 20;

fn weights(expr: &WeightExpr) -> Result<Array<u64>, OpError> {
    random_weight(&Field, expr, 7, LIMIT)
}

/// Units of one, two and three steps of every factor.
fn deals(instance: &Instance) -> Deals {
    let args: Vec<&Type> = instance.args.iter().collect();
    let unit_sets = |ty: &Type| vec![BTreeSet::from([Dim::constant(1)]); ty.rank()];
    let mut deals = Deals {
        operands: instance.args.iter().map(unit_sets).collect(),
        result: unit_sets(&instance.result),
    };
    for factor in factors(&instance.op, &args, &instance.result) {
        for granule in (1..4).map(Dim::constant) {
            let offer = |sets: &mut Vec<BTreeSet<Dim>>, f: &FactorDim| {
                sets[f.dim].insert(&granule * &f.inner);
            };
            for (i, found) in factor.operands.iter().enumerate() {
                if let Some(f) = found {
                    offer(&mut deals.operands[i], f);
                }
            }
            if let FactorResult::Dim(f) = &factor.result {
                offer(&mut deals.result, f);
            }
        }
    }
    deals
}

/// The program of two kinds of steps: the operands in their layouts, then the operation.
pub(crate) fn program(instance: &Instance, mesh: &Mesh, square: &MeshSquare) -> Spmd {
    let mut logical = Graph::new("square");
    let args: Vec<ValueId> =
        instance.args.iter().enumerate().map(|(i, ty)| logical.input(&format!("x{i}"), ty.clone())).collect();
    let value = logical.add_typed(instance.op.clone(), &args, instance.result.clone());
    let compute =
        |value, layout: &Layout, args| Step { value, layout: layout.clone(), kind: StepKind::Compute, args };
    let mut steps: Vec<Step> =
        args.iter().zip(&square.operands).map(|(&arg, layout)| compute(arg, layout, vec![])).collect();
    let operands = (0..steps.len() as u32).map(StepId).collect();
    steps.push(compute(value, &square.result, operands));
    let step = StepId(steps.len() as u32 - 1);
    let outputs = vec![SpmdOutput { name: "y".into(), step }];
    Spmd { mesh: mesh.clone(), imported: logical.len(), logical, equations: vec![], steps, outputs }
}

fn operands(instance: &Instance, seed: u64) -> Vec<Array<u64>> {
    let bindings = super::bindings();
    let shape = |ty: &Type| ty.shape.iter().map(|d| d.eval(&bindings).unwrap() as usize).collect::<Vec<_>>();
    instance
        .args
        .iter()
        .zip(&instance.indexes)
        .enumerate()
        .map(|(i, (ty, index))| {
            let random = random_array(&Field, ty.dtype, &shape(ty), seed * 31 + i as u64).unwrap();
            let Some(bound) = *index else { return random };
            // Indices may be negative.
            let within = |&e: &u64| Field.integer((e % (2 * bound as u64)) as i64 - bound as i64, ty.dtype);
            let data = random.elements().iter().map(within).collect();
            Array::new(ty.dtype, shape(ty), data).unwrap()
        })
        .collect()
}

/// What does not hold of a square.
pub(crate) fn execute(
    instance: &Instance,
    mesh: &Mesh,
    square: &MeshSquare,
    seed: u64,
) -> Result<(), String> {
    let bindings = super::bindings();
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let logical = operands(instance, seed);
    let context = Context { bindings: &bindings, weights: &weights, element_limit: LIMIT };
    let arrays: Vec<&Array<u64>> = logical.iter().collect();
    let expected =
        eval_op(&Field, &instance.op, &instance.result, &arrays, &context).map_err(|e| text(&e))?;
    let mut families = BTreeMap::new();
    for (i, (array, layout)) in logical.iter().zip(&square.operands).enumerate() {
        // Integers have no quotients to split products with.
        let split = if array.dtype.is_integer() && layout.0.contains(&AxisLayout::Partial(Monoid::Prod)) {
            Split::First
        } else {
            Split::Random(seed + i as u64)
        };
        let family = encode(&Field, array, layout, mesh, &bindings, split).map_err(|e| text(&e))?;
        let back = decode(&Field, &family, layout, mesh).map_err(|e| text(&e))?;
        if back != *array {
            return Err(format!("operand {i} does not decode to itself"));
        }
        families.insert(ValueId(i as u32), family);
    }
    let program = program(instance, mesh, square);
    let locals: Vec<Graph> = (0..mesh.ranks())
        .map(|rank| instantiate(&program, rank).map_err(|e| text(&e)))
        .collect::<Result<_, _>>()?;
    let interpreter = Interpreter { domain: &Field, weights: &weights, element_limit: LIMIT, deferred: None };
    let lookup = |rank: usize, value: ValueId, _: &str| families.get(&value)?.get(rank).cloned();
    let outputs = interpreter.run_ranks(&locals, mesh, &bindings, &lookup).map_err(|e| text(&e))?;
    let family: Vec<Array<u64>> = outputs.into_iter().filter_map(|mut o| o.pop()).map(|(_, a)| a).collect();
    let found = decode(&Field, &family, &square.result, mesh).map_err(|e| text(&e))?;
    if found == expected { Ok(()) } else { Err("the results differ".into()) }
}

pub(crate) fn meshes() -> Vec<Mesh> {
    [vec![2], vec![3], vec![4], vec![5], vec![2, 2], vec![2, 3]].map(Mesh).to_vec()
}

pub(crate) fn square_text(square: &MeshSquare) -> String {
    let operands: Vec<String> = square.operands.iter().map(Layout::to_string).collect();
    format!("{} -> {}", operands.join(", "), square.result)
}

pub(crate) fn squares_of(instance: &Instance, mesh: &Mesh) -> Vec<MeshSquare> {
    let args: Vec<&Type> = instance.args.iter().collect();
    squares_on_mesh(&instance.op, &args, &instance.result, mesh, &deals(instance))
}
