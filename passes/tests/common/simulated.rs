//! Running a plan on simulated ranks against the logical graph, in the field modulo 2^61 - 1, where equal means equal.

use tpshard_ir::interp::{Array, Domain, Field, Inputs, Interpreter, Split, random_array, random_weight};
use tpshard_ir::spmd::instantiate;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Bindings, DType, Graph};
use tpshard_passes::Plan;

const LIMIT: usize = 1 << 22;

/// Integers are small: they index tables.
fn inputs(graph: &Graph, bindings: &Bindings) -> Inputs<<Field as Domain>::Element> {
    let mut all = Inputs::new();
    for (seed, (_, name, ty)) in graph.inputs().enumerate() {
        let shape: Vec<usize> =
            ty.shape.iter().map(|d| usize::try_from(d.eval(bindings).unwrap()).unwrap()).collect();
        let array = if ty.dtype == DType::I64 {
            let count = shape.iter().product::<usize>();
            let ids = (0..count).map(|i| Field.integer((i * 7 % 13) as i64, DType::I64)).collect();
            Array::new(DType::I64, shape, ids).unwrap()
        } else {
            random_array(&Field, ty.dtype, &shape, seed as u64).unwrap()
        };
        all.insert(name.clone(), array);
    }
    all
}

/// The checker agrees with the plan, for the ranks together and one by one.
pub fn assert_checked(plan: &Plan, graph: &Graph) {
    for (_, program) in &plan.programs {
        let locals: Vec<_> =
            (0..program.mesh.ranks()).map(|rank| instantiate(program, rank).unwrap()).collect();
        let checked = tpshard_checker::check(program, graph)
            .and_then(|_| tpshard_checker::check_ranks(program, &locals));
        if let Err(findings) = checked {
            panic!("the checker refuses the plan: {findings:#?}\n{}", plan.report);
        }
    }
}

/// All ranks together compute what `graph` computes.
pub fn assert_exact(plan: &Plan, graph: &Graph, bindings: &Bindings) {
    let weights = |expr: &WeightExpr| random_weight(&Field, expr, 5, LIMIT);
    let interpreter = Interpreter { domain: &Field, weights: &weights, element_limit: LIMIT, deferred: None };
    let inputs = inputs(graph, bindings);
    let expected = interpreter.run(graph, &inputs).unwrap();
    for (_, program) in &plan.programs {
        let found = interpreter
            .run_program(program, &inputs, Split::Random(3))
            .unwrap_or_else(|e| panic!("{e}\n{}", plan.report));
        for ((name, a), (_, b)) in expected.iter().zip(&found) {
            assert_eq!(a, b, "{name}\n{}", plan.report);
        }
        assert_eq!(expected.len(), found.len());
    }
}
