#!/usr/bin/env bash
# guidellm, unmodified and in an environment of its own, against the endpoint of ray_config.yaml: synthetic prompts
# through both routes. Run from the repository after `make venv`; its output is recorded in docs/clients.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
guidellm="${GUIDELLM:-build/guidellm/bin/guidellm}"
python="${PYTHON:-.venv/bin/python}"
if [ ! -x "$guidellm" ]; then
	"$python" -m venv build/guidellm
	build/guidellm/bin/pip install 'guidellm==0.8.1'
fi
for route in /v1/completions /v1/chat/completions; do
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 "$python" -m jobs.load.served ray_config.yaml -- "$guidellm" run \
		--backend "kind=openai_http,target={url},request_format=$route,http2=false" \
		--tokenizer kind=hf_auto,model=jobs/demo_model \
		--data kind=synthetic_text,prompt_tokens=700,prompt_tokens_stdev=300,prompt_tokens_min=100,output_tokens=16 \
		--profile kind=concurrent,streams=4 --constraint kind=max_requests,count=16 \
		--output kind=console --output "kind=json,path=build/guidellm$(tr / - <<<"$route").json" --disable-progress
done
