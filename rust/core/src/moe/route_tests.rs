use super::route::{Groups, Router, Scoring, route};
use super::route_backward::route_backward;
use crate::gemm::tests::{at_every_level, noise};
use crate::view::{Array, ArrayMut};

const SCORINGS: [Scoring; 4] = [Scoring::SoftmaxTopk, Scoring::Softmax, Scoring::SoftmaxRenormalised, Scoring::Sigmoid];

fn routed(router: &Router<'_>, logits: &[f64], experts: usize) -> (Vec<i32>, Vec<f64>) {
    let shape = [logits.len() / experts, router.top_k];
    let (mut ids, mut weights) = (vec![-1; shape[0] * shape[1]], vec![f64::NAN; shape[0] * shape[1]]);
    let logits = Array::from_slice(logits, &[shape[0], experts]).unwrap();
    let ids_view = ArrayMut::from_slice(&mut ids, &shape).unwrap();
    route(router, &logits, ids_view, ArrayMut::from_slice(&mut weights, &shape).unwrap()).unwrap();
    (ids, weights)
}

#[test]
fn gradients_are_slopes() {
    at_every_level(|_| {
        for (tokens, experts, top_k) in [(1, 1, 1), (3, 6, 2), (2, 40, 20)] {
            let logits: Vec<f64> = noise(tokens * experts, 7).into_iter().map(|x| 3.0 * x).collect();
            let bias = noise(experts, 8);
            let routers = SCORINGS.into_iter().flat_map(|scoring| {
                let bias = (scoring == Scoring::Sigmoid).then_some(&bias[..]);
                let groups = Groups { count: 1, kept: 1 };
                [false, true].map(|renormalise| Router { top_k, scoring, bias, renormalise, scale: 2.5, groups })
            });
            for router in routers {
                let (ids, _) = routed(&router, &logits, experts);
                let g = noise(tokens * top_k, 9);
                let (pairs, shape) = ([tokens, top_k], [tokens, experts]);
                let mut out = vec![f64::NAN; logits.len()];
                let (ids_view, g_view) =
                    (Array::from_slice(&ids, &pairs).unwrap(), Array::from_slice(&g, &pairs).unwrap());
                let logits_view = Array::from_slice(&logits, &shape).unwrap();
                let out_view = ArrayMut::from_slice(&mut out, &shape).unwrap();
                route_backward(&router, &logits_view, &ids_view, &g_view, out_view).unwrap();
                let loss = |logits: &[f64]| -> f64 {
                    routed(&router, logits, experts).1.iter().zip(&g).map(|(weight, g)| weight * g).sum()
                };
                for at in 0..logits.len() {
                    let (mut up, mut down) = (logits.clone(), logits.clone());
                    up[at] += 1e-6;
                    down[at] -= 1e-6;
                    let slope = (loss(&up) - loss(&down)) / 2e-6;
                    assert!((out[at] - slope).abs() < 1e-8, "{router:?} {at}: {} {slope}", out[at]);
                }
            }
        }
    });
}

#[test]
fn a_router_that_does_not_fit_is_refused() {
    let groups = Groups { count: 1, kept: 1 };
    let fits = Router { top_k: 2, scoring: Scoring::Sigmoid, bias: None, renormalise: false, scale: 1.0, groups };
    let refused = |router: Router<'_>| {
        let logits = [0.0f64; 6];
        let (mut ids, mut weights) = ([0i32; 2], [0f64; 2]);
        let logits = Array::from_slice(&logits, &[1, 6]).unwrap();
        let ids = ArrayMut::from_slice(&mut ids, &[1, 2]).unwrap();
        route(&router, &logits, ids, ArrayMut::from_slice(&mut weights, &[1, 2]).unwrap()).unwrap_err().to_string()
    };
    assert!(refused(Router { top_k: 7, ..fits }).starts_with("top_k:"));
    assert!(refused(Router { groups: Groups { count: 4, kept: 1 }, ..fits }).starts_with("groups:"));
    assert!(refused(Router { groups: Groups { count: 3, kept: 0 }, ..fits }).starts_with("top_groups:"));
    assert!(refused(Router { groups: Groups { count: 6, kept: 1 }, ..fits }).contains("1 groups of 1"));
    assert!(refused(Router { bias: Some(&[0.0; 5]), ..fits }).starts_with("bias:"));
    assert!(refused(Router { bias: Some(&[f64::INFINITY; 6]), ..fits }).contains("expert 0"));
    assert!(refused(Router { bias: Some(&[0.0; 6]), scoring: Scoring::Softmax, ..fits }).starts_with("bias:"));
    assert!(
        refused(Router { groups: Groups { count: 2, kept: 1 }, scoring: Scoring::Softmax, ..fits }).contains("softmax")
    );
}
