"""How fast and lean a pipeline loads, beside diffusers, in one run: python tests/bench_loading.py [--form fp16.bin]

Writes an SD 1.5-sized pipeline folder with random weights (4.3 GB in float32; with --folder DIR it is kept and used
again) and loads it in fresh processes, by turns here and in diffusers: time to a ready pipeline after the imports, and
the highest memory above that after the imports. A mapped file costs nothing before it is read, so every weight is then
summed, and that is in the memory and in a second time. Then what `import minidistill` takes beyond `import torch`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 3
FORMS = ("safetensors", "fp16.safetensors", "bin", "fp16.bin")  # how the files of the weights are named
LOAD = """
import json, resource, sys, time, warnings
warnings.filterwarnings("ignore")
{imports}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
half = sys.argv[2].startswith("fp16")
dtype = torch.float16 if half else torch.float32
{load}
ready = time.perf_counter() - start
weights = [p for m in (pipe.unet, pipe.vae, *encoders(pipe)) for p in m.parameters()]
assert all(p.dtype == dtype for p in weights)
for p in weights:
    p.sum()
read = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([ready, read, 1024 * peak / sum(p.numel() * p.element_size() for p in weights)]))
"""
OURS = LOAD.format(
    imports="import torch, minidistill\nfrom minidistill.pipeline import load_pipeline\n"
    "encoders = lambda pipe: pipe.text_encoders",
    load="pipe = load_pipeline(sys.argv[1], 'cpu', dtype, dtype)",
)
THEIRS = LOAD.format(
    imports="import torch, diffusers, transformers\nfrom diffusers import StableDiffusionPipeline\n"
    "from transformers import CLIPTextModel, CLIPTokenizer\nencoders = lambda pipe: [pipe.text_encoder]\n"
    "diffusers.utils.logging.disable_progress_bar()",
    load="options = {'variant': 'fp16'} if half else {}\n"
    "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, torch_dtype=dtype, **options)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="of the pipeline, written if it is not there; each form has its own"
    )
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="of the weights")
    parser.add_argument("--small", action="store_true", help="a tiny pipeline once, to see that this works")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "sd15"
        if not (folder / "model_index.json").exists():
            subprocess.run([sys.executable, "-c", WRITE, folder, args.form, str(args.small)], check=True)
        if not (folder / f"unet/diffusion_pytorch_model.{args.form}").exists():
            parser.error(f"{folder} holds another form than {args.form}")
        results = {"minidistill": [], "diffusers": []}
        rounds = 1 if args.small else ROUNDS
        for _ in range(rounds):
            results["minidistill"].append(run(OURS, folder, args.form))
            results["diffusers"].append(run(THEIRS, folder, args.form))
    medians = {}
    for name, found in results.items():
        ready, read, peaks = zip(*found, strict=True)
        medians[name] = statistics.median(ready), statistics.median(read)
        print(
            f"{name:12} ready after {medians[name][0]:.2f} s, all weights read after {medians[name][1]:.2f} s "
            f"(medians of {rounds}), at most {max(peaks):.2f}x the weights"
        )
    ratios = [ours / theirs for ours, theirs in zip(*medians.values(), strict=True)]
    print(f"ratios {ratios[0]:.2f} and {ratios[1]:.2f}")
    if args.small:
        return
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


def run(code: str, folder: Path, form: str) -> tuple[float, float, float]:
    """(seconds until it is ready, until all weights are read, highest memory as a multiple of the weights)."""
    done = subprocess.run([sys.executable, "-c", code, folder, form], check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


# The tiny pipeline of the tests has a tokenizer and a scheduler; the networks get SD 1.5's sizes. All are saved as
# .safetensors first: transformers writes no .bin any more.
WRITE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import diffusers, torch, transformers
from pathlib import Path
from tiny import save_tiny_sd1
from safetensors.torch import load_file
folder, form, small = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
save_tiny_sd1(folder)
half = form.startswith("fp16")
options = {{"variant": "fp16"}} if half else {{}}
def save(model, part):
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    (model.half() if half else model).save_pretrained(folder / part, **options)
torch.manual_seed(0)
if small:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    networks = {{part: getattr(pipe, part) for part in ("unet", "vae", "text_encoder")}}
else:
    networks = {{
        "unet": diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, bos_token_id=0, eos_token_id=2,
        )),
    }}
for part, network in networks.items():
    save(network, part)
if form.endswith("bin"):
    for file in folder.rglob("*.safetensors"):
        name = file.name.removesuffix("safetensors") + "bin"
        torch.save(load_file(file), file.with_name(f"pytorch_{{name}}" if name.startswith("model") else name))
        file.unlink()
"""

if __name__ == "__main__":
    main()
