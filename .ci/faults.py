"""Seed faults one at a time and see a named test fail for each.

    pip install -e ".[test]" && python .ci/faults.py

Each fault is planted in a copy of the tree; the checkout is not touched. Every named test must pass without the fault.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FAULTS = [
    # what goes wrong, file, text, its faulty form, the test that sees it
    (
        "a gradient's sign",
        "invdiff/likelihoods/gaussian.py",
        "self.operator.adjoint(w / self._std(w))",
        "-self.operator.adjoint(w / self._std(w))",
        "tests/test_likelihoods.py::test_gaussian_is_the_normal_density",
    ),
    (
        "a missing 1/2",
        "invdiff/likelihoods/gaussian.py",
        "return -0.5 * self.deviance(x)",
        "return -self.deviance(x)",
        "tests/test_likelihoods.py::test_gaussian_is_the_normal_density",
    ),
    (
        "the wrong boundary in an adjoint",
        "invdiff/operators/boundary.py",
        "core.narrow(dim, 1, before).add_(head.flip(dim))",
        "core.narrow(dim, 0, before).add_(head.flip(dim))",
        "tests/test_operators.py::test_contract",
    ),
    (
        "an unpermuted state: resampled draws that stay where they were",
        "invdiff/solution.py",
        "torch.stack([row[i.to(row.device)] for row, i in zip(rows, index, strict=True)])",
        "torch.stack([row for row, i in zip(rows, index, strict=True)])",
        "tests/test_solution.py::test_weighted_draws_are_resampled_within_their_chain",
    ),
    (
        "a dropped weight",
        "invdiff/samplers/importance.py",
        "return Draws(z=state.z, log_weights=log_weights,",
        "return Draws(z=state.z, log_weights=0.0 * log_weights,",
        "tests/test_exactness.py::test_importance_sampling_is_exact_on_the_plane_with_its_evidence",
    ),
    (
        "[0, 1] for [-1, 1]: the decoder's offset left in the measurement",
        "invdiff/linear_gaussian.py",
        "if decoder.offset:",
        "if False:",
        "tests/test_posterior.py::test_the_linear_problem_is_the_composition_less_its_offset",
    ),
    (
        "one noise for all particles",
        "invdiff/kernels/philox_normal/reference.py",
        "(block, slots[:, None],",
        "(block, torch.zeros_like(slots)[:, None],",
        "tests/test_noise.py::test_streams_are_independent_of_each_other",
    ),
    (
        "measurements handed to the wrong problems' particles",
        "invdiff/posterior.py",
        ".repeat_interleave(m // p)",
        ".repeat(m // p)",
        "tests/test_posterior.py::test_company_and_micro_batches_do_not_change_draws",
    ),
    (
        "a multistep solver that extrapolates the wrong way",
        "invdiff/integrators/dpm_solver.py",
        "(1.0 + half_over_r) * d - half_over_r * memory",
        "(1.0 - half_over_r) * d + half_over_r * memory",
        "tests/test_integrators.py::test_order_of_convergence",
    ),
    (
        "moment matching without sigma^2",
        "invdiff/samplers/pigdm.py",
        "lambda v: sigma**2 * block.vjp(v)",
        "lambda v: sigma * block.vjp(v)",
        "tests/test_samplers.py::test_the_guided_denoiser_is_that_of_the_posterior",
    ),
    (
        "noise of an exact inner draw left out",
        "invdiff/samplers/inner.py",
        "- rows.noise_std.to(x.dtype) * eps",
        "- 0.0 * eps",
        "tests/test_samplers.py::test_daps_exact_inner_draws_from_its_gaussian",
    ),
    (
        "the wrong plotting positions in an interval",
        "invdiff/metrics/ensemble.py",
        "position = q * (n + 1)",
        "position = q * (n - 1) + 1",
        "tests/test_metrics.py::test_quantile_is_numpys_weibull",
    ),
    (
        "the steps of a resumed run drawn from the streams of the first ones",
        "invdiff/driver.py",
        "sampler.step(posterior, state, noise=noise.at(state.step + 1))",
        "sampler.step(posterior, state, noise=noise.at(len(trace) - resumed + 1))",
        "tests/test_driver.py::test_a_resumed_run_gives_the_draws_of_the_uncut_one",
    ),
    (
        "the noise of the data left out of DDRM's variance",
        "invdiff/samplers/ddrm.py",
        "left = (sigma**2 - (eta_b * noise_std / torch.where(known, s, 1.0)) ** 2)",
        "left = (sigma**2 - (0.0 * noise_std / torch.where(known, s, 1.0)) ** 2)",
        "tests/test_ddrm.py::test_variances_are_those_of_the_theory",
    ),
    (
        "a proximal step with lambda upside down",
        "invdiff/samplers/diffpir.py",
        "sigma**2 / self.lam)",
        "sigma**2 * self.lam)",
        "tests/test_diffpir.py::test_one_step_is_that_of_dense_algebra",
    ),
    (
        "a prior step without its noise",
        "invdiff/samplers/split_gibbs.py",
        "+ rho / sqrt(steps) * noise.like(z)",
        "+ 0.0 * noise.like(z)",
        "tests/test_split_gibbs.py::test_z_given_x_is_as_wide_as_rho_where_the_prior_is_broad",
    ),
    (
        "coil maps that are not conjugated in the adjoint",
        "invdiff/operators/mri.py",
        "(picture * maps.conj()).sum(1)",
        "(picture * maps).sum(1)",
        "tests/test_mri.py::test_contract",
    ),
    (
        "another network's deviation of the data",
        "invdiff/priors/adapters/parametrisations.py",
        "s = self.sigma_data",
        "s = 1.5 * self.sigma_data",
        "tests/test_prior_adapters.py::test_the_denoiser_is_exact_between_the_steps_too",
    ),
    (
        "twisted weights without the last twist",
        "invdiff/samplers/twisted_smc.py",
        "increment = torch.logsumexp(joint, dim=-1) - state.log_twist",
        "increment = torch.logsumexp(joint, dim=-1) - 0.0 * state.log_twist",
        "tests/test_discrete_samplers.py::test_twisted_particles_tend_to_the_enumerated_posterior",
    ),
    (
        "a likelihood ratio that is tempered",
        "invdiff/samplers/masked_gibbs.py",
        ".log() < gained",
        ".log() < 0.5 * gained",
        "tests/test_discrete_samplers.py::test_a_move_leaves_the_posterior_as_it_is",
    ),
    (
        "conditionals that see what is known on one side alone",
        "invdiff/priors/chain.py",
        "log_matmul(backward[-1] + evidence[:, length - i], P.mT)",
        "log_matmul(backward[-1], P.mT)",
        "tests/test_masked_priors.py::test_conditionals_are_those_of_enumeration_at_any_masking",
    ),
    (
        "calibration that ranks a constant for the log-likelihood",
        "invdiff/diagnostics/calibration.py",
        "{**functions, LIKELIHOOD: log_likelihood}",
        "{**functions, LIKELIHOOD: lambda x: 0.0 * log_likelihood(x)}",
        "tests/test_calibration.py::test_ignoring_the_measurement_is_caught_by_the_log_likelihood_alone",
    ),
]


def passes(root: Path, test: str) -> bool:
    """Whether a test passes in a tree."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Plant every fault and tell what saw it."""
    source = Path(__file__).resolve().parent.parent
    unseen = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        for name, file, text, faulty, test in FAULTS:
            path = root / file
            right = path.read_text(encoding="utf-8")
            if right.count(text) != 1:
                print(f"STALE   {name}: {file} holds {text!r} {right.count(text)} times")
                unseen.append(name)
                continue
            sound = passes(root, test)
            path.write_text(right.replace(text, faulty), encoding="utf-8")
            caught = not passes(root, test)
            path.write_text(right, encoding="utf-8")
            verdict = "caught " if sound and caught else "UNSEEN " if sound else "BROKEN "
            print(f"{verdict} {name}: {test}", flush=True)
            if not (sound and caught):
                unseen.append(name)
    print(f"{len(FAULTS) - len(unseen)} of {len(FAULTS)} faults caught")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
