"""Parts of the study `likelihood_displacement`: words, sentences and refusals."""
