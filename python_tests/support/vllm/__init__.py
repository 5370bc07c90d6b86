"""What the tests of the vLLM plugin need: drafting without vLLM, and vLLM engines in processes of their own."""
