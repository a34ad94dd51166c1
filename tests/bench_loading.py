"""How fast and lean a pipeline loads, beside diffusers, in one run: python tests/bench_loading.py [--folder DIR]

Writes an SD 1.5-sized pipeline folder with random weights (4.3 GB in float32; with --folder it is kept and used again)
and loads it in fresh processes, by turns here and in diffusers: time to a ready pipeline after the imports, and the
highest memory above that after the imports. Then what `import minidistill` takes beyond `import torch`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 3
LOAD = """
import json, resource, sys, time, warnings
warnings.filterwarnings("ignore")
{imports}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
weights = sum(p.numel() * p.element_size() for m in (pipe.unet, pipe.vae, *encoders(pipe)) for p in m.parameters())
print(json.dumps([seconds, 1024 * peak / weights]))
"""
OURS = LOAD.format(
    imports="import torch, minidistill\nfrom minidistill.pipeline import load_pipeline\n"
    "encoders = lambda pipe: pipe.text_encoders",
    load="pipe = load_pipeline(sys.argv[1])",
)
THEIRS = LOAD.format(
    imports="import torch, diffusers, transformers\nfrom diffusers import StableDiffusionPipeline\n"
    "from transformers import CLIPTextModel, CLIPTokenizer\nencoders = lambda pipe: [pipe.text_encoder]\n"
    "diffusers.utils.logging.disable_progress_bar()",
    load="pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary) / "sd15"
        if not (folder / "model_index.json").exists():
            subprocess.run([sys.executable, "-c", WRITE, folder], check=True)
        results = {"minidistill": [], "diffusers": []}
        for _ in range(ROUNDS):
            results["minidistill"].append(run(OURS, folder))
            results["diffusers"].append(run(THEIRS, folder))
    seconds = {name: statistics.median(s for s, _ in found) for name, found in results.items()}
    for name, found in results.items():
        peak = max(peak for _, peak in found)
        print(f"{name:12} ready after {seconds[name]:.2f} s (median of {ROUNDS}), at most {peak:.2f}x the weights")
    print(f"ratio {seconds['minidistill'] / seconds['diffusers']:.2f}")
    times = {code: statistics.median(import_seconds(code) for _ in range(5)) for code in IMPORTS}
    torch_alone = times[IMPORTS[0]]
    for code in IMPORTS[1:]:
        print(f"{code.partition('; ')[2]!r} takes {times[code] - torch_alone:.2f} s beyond import torch")


IMPORTS = (
    "import torch",
    "import torch; import minidistill",
    "import torch; from minidistill.pipeline import load_pipeline",
)


def import_seconds(code: str) -> float:
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True).stdout)


def run(code: str, folder: Path) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


# The tiny pipeline of the tests has a tokenizer and a scheduler; the networks get SD 1.5's sizes.
WRITE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import diffusers, torch, transformers
from pathlib import Path
from conftest import save_tiny_sd1
folder = Path(sys.argv[1])
save_tiny_sd1(folder)
torch.manual_seed(0)
diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_pretrained(folder / "unet")
diffusers.AutoencoderKL(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
).save_pretrained(folder / "vae")
transformers.CLIPTextModel(transformers.CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, bos_token_id=0, eos_token_id=2,
)).save_pretrained(folder / "text_encoder")
"""

if __name__ == "__main__":
    main()
