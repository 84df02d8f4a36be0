"Run the command: `python -m ditnano`."
from ditnano.cli import main

if __name__ == "__main__": main()
